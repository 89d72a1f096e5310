// SPDX-License-Identifier: Apache-2.0
// chat, streaming, usage, errors, cancellation through the official `openai` package for Node.
import assert from 'node:assert/strict';
import OpenAI from 'openai';

const url = process.env.TD_URL;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0 });
const model = 'glm-tiny';
const messages = [{ role: 'user', content: 'What is 23 + 48?' }];
const metric = async (name) => {
  const text = await (await fetch(`${url}/metrics`)).text();
  return text.split('\n').filter((l) => l.startsWith(name + ' ')).reduce((s, l) => s + Number(l.split(' ')[1]), 0);
};

const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
assert.equal(whole.choices[0].finish_reason, 'stop');
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
console.log('ok chat');

let text = '', usage, finish;
for await (const c of await client.chat.completions.create({ model, messages, temperature: 0, stream: true, stream_options: { include_usage: true } })) {
  usage = c.usage ?? usage;
  for (const ch of c.choices) { text += ch.delta.content ?? ''; finish = ch.finish_reason ?? finish; }
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(finish, 'stop');
assert.ok(usage.completion_tokens > 0);
console.log('ok streaming');

await assert.rejects(client.chat.completions.create({ model, messages, temperature: 5 }), (e) => e.status === 400 && e.code === 'invalid_value' && e.param === 'temperature');
await assert.rejects(client.chat.completions.create({ model: 'no', messages }), (e) => e.status === 404 && e.code === 'model_not_found');
await assert.rejects(client.chat.completions.create({ model, messages: [{ role: 'user', content: 'a '.repeat(30000) }] }), (e) => e.code === 'context_length_exceeded');
console.log('ok errors');

const before = await metric('tandem_requests_cancelled_total');
const stream = await client.chat.completions.create({ model, messages, stream: true, max_tokens: 400, ignore_eos: true });
for await (const c of stream) break;
stream.controller.abort();
for (let i = 0; i < 300 && (await metric('tandem_requests_cancelled_total')) === before; i++) await new Promise((r) => setTimeout(r, 20));
assert.equal(await metric('tandem_requests_cancelled_total'), before + 1);
console.log('ok cancellation');
