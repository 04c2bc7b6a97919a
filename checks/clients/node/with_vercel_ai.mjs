// Vercel's AI SDK: OpenAI's provider with its default model (the Responses API) and its chat model, the
// provider for OpenAI-compatible servers, and Anthropic's.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createAnthropic } from "@ai-sdk/anthropic";
import { openai } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { Output, stepCountIs, tool } from "ai";
import { z } from "zod";

const name = process.env.PENSTOCK_MODEL;
const compatible = createOpenAICompatible({
  name: "penstock",
  baseURL: process.env.OPENAI_BASE_URL,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const anthropic = createAnthropic({ baseURL: `${process.env.ANTHROPIC_BASE_URL}/v1` });
const models = {
  "OpenAI's default model": openai(name),
  "OpenAI's chat model": openai.chat(name),
  "the compatible model": compatible(name),
  "Anthropic's model": anthropic(name),
};
const prompt = "My name is Alice. What is my name?";
const tools = {
  get_weather: tool({
    description: "Get the weather in a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => ({ temperature_c: city === "Paris" ? 21 : -1 }),
  }),
};
const asked = { tools, stopWhen: stepCountIs(3), prompt: "What is the weather in Paris?" };

for (const [which, model] of Object.entries(models)) {
  test(`generateText with ${which} gives the answer and its usage`, async () => {
    const { text, usage, finishReason } = await generateText({ model, prompt });
    assert.match(text, /Alice/);
    assert.equal(finishReason, "stop");
    assert.ok(usage.inputTokens > 0 && usage.outputTokens > 0);
  });

  test(`streamText with ${which} streams the answer`, async () => {
    const result = streamText({ model, prompt });
    let streamed = "";
    for await (const part of result.textStream) streamed += part;
    assert.match(streamed, /Alice/);
    assert.ok((await result.usage).outputTokens > 0);
  });

  test(`generateText with ${which} calls the tool and answers with its result`, async () => {
    const { text, steps } = await generateText({ model, ...asked });
    assert.deepEqual(steps.map((step) => step.toolCalls.map((call) => call.input)), [[{ city: "Paris" }], []]);
    assert.match(text, /21/);
  });

  test(`streamText with ${which} calls the tool and answers with its result`, async () => {
    const result = streamText({ model, ...asked });
    assert.match(await result.text, /21/);
    assert.equal((await result.steps).length, 2);
  });

  test(`generateText with ${which} gives an object of the schema`, async () => {
    const schema = z.object({ name: z.string(), age: z.number().int() });
    const { output } = await generateText({
      model,
      output: Output.object({ schema }),
      prompt: "Alice is 30 years old.",
    });
    assert.equal(output.age, 30);
  });
}
