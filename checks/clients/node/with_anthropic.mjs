// Anthropic's SDK for Node.js.
import assert from "node:assert/strict";
import { test } from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";

const client = new Anthropic();
const model = process.env.PENSTOCK_MODEL;
const wanted = { model, max_tokens: 50, messages: [{ role: "user", content: "My name is Alice. What is my name?" }] };

test("a message is answered whole and streamed with the same text", async () => {
  const message = await client.messages.create(wanted);
  const stream = client.messages.stream(wanted);
  assert.match(message.content[0].text, /Alice/);
  assert.equal(await stream.finalText(), message.content[0].text);
});

test("countTokens gives the tokens that the usage has", async () => {
  const { usage } = await client.messages.create(wanted);
  const counted = await client.messages.countTokens({ model, messages: wanted.messages });
  assert.equal(counted.input_tokens, usage.input_tokens + usage.cache_read_input_tokens);
});

test("a model that is not served is the SDK's NotFoundError", async () => {
  await assert.rejects(client.messages.create({ ...wanted, model: "unknown" }), Anthropic.NotFoundError);
});

for (const stream of [false, true]) {
  test(`the tool runner ${stream ? "with a stream " : ""}calls the tool and ends with its result`, async () => {
    const weather = betaZodTool({
      name: "get_weather",
      description: "Get the weather in a city.",
      inputSchema: z.object({ city: z.string() }),
      run: ({ city }) => JSON.stringify({ temperature_c: city === "Paris" ? 21 : -1 }),
    });
    const runner = client.beta.messages.toolRunner({
      model,
      max_tokens: 200,
      tools: [weather],
      messages: [{ role: "user", content: "What is the weather in Paris?" }],
      stream,
    });
    const message = await runner.runUntilDone();
    assert.equal(message.stop_reason, "end_turn");
    assert.match(message.content[0].text, /21/);
  });
}

test("parse gives an object of the schema", async () => {
  const person = z.object({ name: z.string(), age: z.int() });
  const message = await client.messages.parse({
    model,
    max_tokens: 100,
    messages: [{ role: "user", content: "Alice is 30 years old." }],
    output_config: { format: zodOutputFormat(person) },
  });
  assert.equal(message.parsed_output.age, 30);
});
