// A client of the mesh in another language, from its first line to the last of an episode.
//
// It needs three things: NATS, msgpack, and ../../../schemas. MESHRL_URL says where the server is; a worker must serve
// the env "cartpole" there (tests/contract/test_js.py starts both).

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { connect } from "@nats-io/transport-node";
import { decode, encode } from "@msgpack/msgpack";

// ---------------------------------------------------------------- values

// Arrays travel as maps: byte order, kind and size of the items, shape, and the items' bytes in C order.
const TYPED_ARRAYS = {
  "|b1": Uint8Array,
  "|u1": Uint8Array,
  "|i1": Int8Array,
  "<u2": Uint16Array,
  "<i2": Int16Array,
  "<u4": Uint32Array,
  "<i4": Int32Array,
  "<u8": BigUint64Array,
  "<i8": BigInt64Array,
  "<f4": Float32Array,
  "<f8": Float64Array,
};

function arrayOf(form) {
  const TypedArray = TYPED_ARRAYS[form.type];
  if (TypedArray === undefined) throw new Error(`arrays of ${form.type} are not needed here`);
  // A copy, since a typed array must begin where its items are aligned. Not by slice: of Node's Buffers that is a view.
  const data = Uint8Array.from(form.data);
  const items = new TypedArray(data.buffer, 0, data.byteLength / TypedArray.BYTES_PER_ELEMENT);
  if (!form.nd) return items[0]; // a NumPy scalar
  const count = form.shape.reduce((product, length) => product * length, 1);
  if (count !== items.length) throw new Error(`${items.length} items for an array of shape ${form.shape}`);
  return { dtype: form.type, shape: form.shape, items };
}

// What a plain msgpack decoder gave, with the forms of ../../../schemas/v1/messages/value.json made into values.
function revive(value) {
  if (Array.isArray(value)) return value.map(revive);
  if (value === null || typeof value !== "object" || value instanceof Uint8Array) return value;
  if ("nd" in value) return arrayOf(value);
  if (value.py === "tuple") return value.v.map(revive);
  if ("py" in value || "complex" in value) throw new Error(`no need for ${value.py ?? "complex"} here`);
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, revive(item)]));
}

// ---------------------------------------------------------------- the mesh

// A name as one token of a subject: NATS gives dots, stars and blanks a meaning.
function token(text) {
  const escape = (byte) => `%${byte.toString(16).toUpperCase().padStart(2, "0")}`;
  const written = (character) => Array.from(new TextEncoder().encode(character), escape).join("");
  return Array.from(text, (c) => (/^[A-Za-z0-9_\-/:@+=]$/.test(c) ? c : written(c))).join("");
}

// What a worker answers in place of a reply. The code is for programs, the message for people.
class MeshError extends Error {
  constructor({ code, message, details = {} }) {
    super(message);
    this.code = code;
    this.details = details;
  }
}

function checked(data) {
  const body = revive(decode(data));
  if (body.error !== undefined) throw new MeshError(body.error);
  return body;
}

class Mesh {
  static async connect(address, namespace = "default") {
    const url = new URL(address);
    const [user, pass] = [decodeURIComponent(url.username), decodeURIComponent(url.password)];
    const connection = await connect({ servers: url.host, ...(user && { user, pass }) });
    return new Mesh(connection, token(user || "anon"), `meshrl.v1.${token(namespace)}.`);
  }

  constructor(connection, user, prefix) {
    Object.assign(this, { connection, user, prefix });
  }

  // One request and the bytes of its answer. "No responders" rejects at once: nobody listens there.
  async ask(subject, body) {
    const answer = await this.connection.request(this.prefix + subject, encode(body), { timeout: 10_000 });
    return answer.data;
  }

  // Every worker answers with what it serves; this takes the first that serves the name.
  async discover(name) {
    const known = checked(await this.ask("registry.ask", { v: 1, kind: "env", name }));
    return known.descriptions.find((description) => description.name === name);
  }

  // Open a session at one worker. The client chooses the session's id, so that asking again is safe.
  async open(description, { kwargs = {} } = {}) {
    const { name, worker } = description;
    const session = randomBytes(8).toString("hex");
    const open = { v: 1, session, name, kwargs, park_s: 5.0 };
    const answer = checked(await this.ask(`worker.${worker}.open.${this.user}`, open));
    if (answer.session === undefined) throw new Error(`worker ${worker} is full: ${JSON.stringify(answer.load)}`);
    const env = new Session(this, answer);
    await env.renew(); // at once: a grant that is neither renewed nor used lapses after grant_s
    env.renewing = setInterval(() => env.renew(), (answer.lease_s / 3) * 1000);
    return env;
  }

  close() {
    return this.connection.close();
  }
}

class Session {
  seq = 0; // rises by one a request, errors included

  constructor(mesh, grant) {
    Object.assign(this, { mesh, grant });
    this.subject = `session.${grant.worker}.${mesh.user}.${grant.session}`;
  }

  // The bytes of an answer; the same seq again gets the same bytes, and runs nothing.
  send(op, seq, fields = {}) {
    return this.mesh.ask(`${this.subject}.${op}`, { epoch: this.grant.epoch, lane: 0, seq, ...fields });
  }

  async request(op, fields) {
    this.seq += 1;
    const reply = checked(await this.send(op, this.seq, fields));
    assert.equal(reply.seq, this.seq);
    return reply;
  }

  async renew() {
    const { worker, session, epoch } = this.grant;
    const body = { v: 1, sessions: [[session, epoch]] };
    const { lost = [] } = checked(await this.mesh.ask(`worker.${worker}.renew.${this.mesh.user}`, body));
    if (lost.length > 0) throw new Error(`session ${session} is lost: ${lost[0][1]}`);
  }

  async close() {
    clearInterval(this.renewing);
    return checked(await this.mesh.ask(`${this.subject}.close`, { v: 1, epoch: this.grant.epoch }));
  }
}

// ---------------------------------------------------------------- spaces

// One number stands for an array of them; infinities are text.
function bound(numbers, index) {
  const number = Array.isArray(numbers) ? numbers[index] : numbers;
  return { inf: Infinity, "-inf": -Infinity }[number] ?? number;
}

function checkBox(space, array) {
  assert.equal(space.space, "box");
  assert.equal(array.dtype, space.dtype);
  assert.deepEqual(array.shape, space.shape);
  array.items.forEach((item, index) => {
    assert.ok(bound(space.low, index) <= item && item <= bound(space.high, index), `${item} is out of bounds`);
  });
}

// ---------------------------------------------------------------- the proof

test("an episode, from discovery to close", async (t) => {
  const mesh = await Mesh.connect(process.env.MESHRL_URL);
  t.after(() => mesh.close());

  const description = await mesh.discover("cartpole");
  assert.equal(description.action_space.space, "discrete");
  const env = await mesh.open(description);
  t.after(() => clearInterval(env.renewing));
  assert.equal(env.grant.epoch, 1);
  assert.equal(env.grant.description.name, "cartpole");

  // An error has a code, uses up its seq, and does no harm.
  await assert.rejects(env.request("step", { action: 0 }), { code: "reset_needed" });

  const first = await env.request("reset", { seed: 7 });
  assert.ok(first.obs.items instanceof Float32Array);
  checkBox(description.observation_space, first.obs);

  let [steps, rewards, last] = [0, 0, null];
  do {
    last = await env.request("step", { action: steps % description.action_space.n });
    checkBox(description.observation_space, last.obs);
    assert.equal(typeof last.terminated, "boolean");
    rewards += last.reward;
    steps += 1;
  } while (!last.terminated && !last.truncated);
  assert.ok(steps > 5);
  assert.equal(rewards, steps);

  // The last step again: the same bytes, and no other step.
  const request = { action: (steps - 1) % description.action_space.n };
  const again = [await env.send("step", env.seq, request), await env.send("step", env.seq, request)];
  assert.deepEqual(again[0], again[1]);
  assert.deepEqual(checked(again[0]), last);
  const { state } = await env.request("state");
  assert.deepEqual([state.phase, state.steps, state.episode_return, state.seed], ["ended", steps, rewards, 7]);

  // The same seed is the same episode.
  assert.deepEqual((await env.request("reset", { seed: 7 })).obs, first.obs);

  // Out of order: told by code, and nothing was run.
  const gap = await env.send("step", env.seq + 2, { action: 0 });
  assert.throws(() => checked(gap), { code: "sequence_gap" });
  const stale = await env.send("step", 1, { action: 0 });
  assert.throws(() => checked(stale), { code: "stale_request" });
  assert.equal((await env.request("state")).state.steps, 0);

  assert.deepEqual(await env.close(), { v: 1, existed: true });
  await assert.rejects(env.request("step", { action: 0 }), { code: "session_unknown" });
});

test("a client that keeps no directory opens at whichever worker NATS picks", async (t) => {
  const mesh = await Mesh.connect(process.env.MESHRL_URL);
  t.after(() => mesh.close());
  const open = { v: 1, session: randomBytes(8).toString("hex"), name: "cartpole" };
  const env = new Session(mesh, checked(await mesh.ask(`env.${token("cartpole")}.open.${mesh.user}`, open)));
  assert.deepEqual((await env.request("reset", { seed: 1 })).obs.shape, [4]);
  assert.equal((await env.close()).existed, true);
});

test("what a worker refuses has a code", async (t) => {
  const mesh = await Mesh.connect(process.env.MESHRL_URL);
  t.after(() => mesh.close());
  const description = await mesh.discover("cartpole");
  await assert.rejects(mesh.open({ ...description, name: "no such env" }), { code: "unknown_name" });
  await assert.rejects(mesh.open(description, { kwargs: { gravity: 1 } }), { code: "kwargs_not_allowed" });
  const open = `worker.${description.worker}.open.${mesh.user}`;
  for (const [body, code] of [
    [{ v: 2, session: "s", name: "cartpole" }, "unsupported_version"],
    [{ v: 1, session: "not an id", name: "cartpole" }, "malformed_message"],
  ]) {
    const answer = await mesh.ask(open, body);
    assert.throws(() => checked(answer), { code });
  }
});

test("the golden arrays are read to the byte", () => {
  const file = new URL("../../../schemas/v1/golden/arrays.json", import.meta.url);
  let read = 0;
  for (const { name, key_style, value, hex } of JSON.parse(readFileSync(file, "utf-8"))) {
    const { dtype, shape, data } = value.array ?? {};
    if (key_style !== "str" || !(dtype in TYPED_ARRAYS)) continue;
    const array = revive(decode(Buffer.from(hex, "hex")));
    assert.deepEqual([array.dtype, array.shape], [dtype, shape], name);
    assert.equal(Buffer.from(array.items.buffer).toString("hex"), data, name);
    read += 1;
  }
  assert.ok(read >= Object.keys(TYPED_ARRAYS).length);
});
