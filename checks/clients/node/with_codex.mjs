// The Codex command line: whole turns of `codex exec`.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";

const home = join(process.env.HOME, "codex");
mkdirSync(home);
writeFileSync(
  join(home, "config.toml"),
  `
model = "${process.env.PENSTOCK_MODEL}"
model_provider = "penstock"

[model_providers.penstock]
name = "Penstock"
base_url = "${process.env.OPENAI_BASE_URL}"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
`,
);

/** The events that `codex exec` prints. */
function exec(...words) {
  const options = ["exec", "--json", "--skip-git-repo-check", "--sandbox", "read-only"];
  const ended = spawnSync(join("node_modules", ".bin", "codex"), [...options, ...words], {
    env: { ...process.env, CODEX_HOME: home },
    stdio: ["ignore", "pipe", "inherit"],
    encoding: "utf8",
    timeout: 240_000,
  });
  const events = ended.stdout.trim().split("\n").map((line) => JSON.parse(line));
  assert.equal(ended.status, 0, ended.stdout);
  return events;
}

test("exec ends its turn with a message of the model and its usage", () => {
  const events = exec("say hi");
  const message = events.find((event) => event.item?.type === "agent_message");
  // The prompt is too much for the shipped model: it may begin a tool call and end, which vLLM's parsers do
  // not stream as text.
  assert.equal(typeof message.item.text, "string");
  assert.equal(events.at(-1).type, "turn.completed");
  assert.ok(events.at(-1).usage.output_tokens > 0);
});
