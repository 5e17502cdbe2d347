// Greedy replies of llama.cpp, for gguf_replies.py: node llama_cpp.mjs FILE.gguf PROMPTS.json COUNT
// In the working folder: npm install --ignore-scripts --omit=optional node-llama-cpp @node-llama-cpp/linux-x64
import fs from "fs";
import { createRequire } from "module";
import { pathToFileURL } from "url";

const found = createRequire(`${process.cwd()}/`).resolve("node-llama-cpp");
const { getLlama } = await import(pathToFileURL(found).href);
const [file, prompts, count] = process.argv.slice(2);
const llama = await getLlama({ build: "never", gpu: false, logLevel: "error", maxThreads: 1 });
const model = await llama.loadModel({ modelPath: file, useMmap: false });
const replies = [];
for (const prompt of JSON.parse(fs.readFileSync(prompts))) {
  // keys and values in F32: in llama.cpp's default of F16 the likeliest of two nearly equal tokens may be another one
  const types = { experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false };
  const context = await model.createContext({ contextSize: 256, threads: 1, ...types });
  const ids = model.tokenize(prompt.text, prompt.is_chat);
  const reply = [];
  for await (const token of context.getSequence().evaluate(ids, { temperature: 0 })) {
    if (model.isEogToken(token)) break;
    reply.push(token);
    if (reply.length >= Number(count)) break;
  }
  replies.push({ ids, reply });
  await context.dispose();
}
console.log(JSON.stringify(replies));
process.exit(0);
