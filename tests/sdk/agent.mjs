// The official Connect client for Node against the agent, every procedure of hostagent.v1, with code generated from the .proto files.
//
// Runs in the rig, over HTTP/1.1 and h2, binary and JSON. All four ways must see the same.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { Code, ConnectError, createClient } from '@connectrpc/connect'
import { createConnectTransport } from '@connectrpc/connect-node'
import { HostAgentService } from './gen/hostagent_pb.js'

const PATIENCE_MS = 300_000
const pki = (name) => readFileSync(`/etc/roost/pki/${name}`)
const certificates = { ca: pki('ca.pem'), cert: pki('client.pem'), key: pki('client-key.pem') }
const text = (bytes) => new TextDecoder().decode(bytes)
const bytes = (text) => new TextEncoder().encode(text)
const called = new Set()

// A client that notes which procedures were called.
function client(httpVersion, useBinaryFormat) {
  const noted = (next) => (request) => {
    called.add(request.method.name)
    return next(request)
  }
  const transport = createConnectTransport({
    baseUrl: 'https://127.0.0.1:50051',
    httpVersion,
    useBinaryFormat,
    nodeOptions: certificates,
    interceptors: [noted],
  })
  return createClient(HostAgentService, transport)
}

async function collect(stream) {
  const events = []
  for await (const event of stream) events.push(event)
  return events
}

async function refused(promise, code) {
  await assert.rejects(promise, (error) => error instanceof ConnectError && error.code === code)
}

async function eventually(what, look) {
  const deadline = Date.now() + PATIENCE_MS
  for (;;) {
    const found = await look()
    if (found) return found
    assert.ok(Date.now() < deadline, `waited in vain for ${what}`)
    await new Promise((done) => setTimeout(done, 100))
  }
}

const output = (events) =>
  text(Buffer.concat(events.filter((e) => e.event.case === 'data').map((e) => Buffer.from(e.event.value.output.value))))

// What does not change what other calls find; the answers, without what differs from run to run.
async function look(agent, sandboxId) {
  const seen = {}
  const exec = await agent.exec({ sandboxId, cmd: '/bin/sh', args: ['-c', 'echo out; echo err >&2; exit 3'] })
  seen.exec = [text(exec.stdout), text(exec.stderr), exec.exitCode]

  const stream = await collect(agent.execStream({ sandboxId, cmd: '/bin/sh', args: ['-c', 'seq 3; exit 4'] }))
  assert.ok(stream[0].event.value.pid > 0)
  seen.execStream = [output(stream), stream.at(-1).event.value.exitCode]

  const tag = `bg-${Math.random()}`
  const background = await agent.startBackground({ sandboxId, cmd: '/bin/sh', args: ['-c', 'echo begun; exec sleep 1000'], tag })
  assert.equal(background.tag, tag)
  const listed = await agent.listProcesses({ sandboxId })
  assert.ok(listed.processes.some((process) => process.pid === background.pid && process.tag === tag))
  const connected = collect(agent.connectProcess({ sandboxId, selector: { case: 'tag', value: tag } }))
  await eventually('what it wrote', async () => (await agent.exec({ sandboxId, cmd: 'pgrep', args: ['-x', 'sleep'] })).exitCode === 0)
  await agent.killProcess({ sandboxId, selector: { case: 'pid', value: background.pid }, signal: 'SIGTERM' })
  const events = await connected
  seen.connectProcess = [output(events), events.at(-1).event.value.exitCode]

  let shown = ''
  let exited
  const terminal = (async () => {
    for await (const { event } of agent.ptyAttach({ sandboxId, tag: `pty-${tag}`, cmd: '/bin/sh', cols: 90, rows: 20 })) {
      if (event.case === 'output') shown += text(event.value.data)
      if (event.case === 'exited') exited = event.value.exitCode
    }
  })()
  await eventually('the prompt', () => shown.length > 0)
  await agent.ptyResize({ sandboxId, tag: `pty-${tag}`, cols: 100, rows: 30 })
  await agent.ptySendInput({ sandboxId, tag: `pty-${tag}`, data: bytes('stty size\n') })
  await eventually('the size', () => shown.includes('30 100'))
  await agent.ptyKill({ sandboxId, tag: `pty-${tag}` })
  await terminal
  seen.pty = exited

  const dir = `/root/${tag}`
  seen.makeDir = (await agent.makeDir({ sandboxId, path: `${dir}/below` })).entry.type
  await agent.writeFile({ sandboxId, path: `${dir}/whole`, content: bytes('whole') })
  seen.readFile = text((await agent.readFile({ sandboxId, path: `${dir}/whole` })).content)
  async function* pieces() {
    yield { content: { case: 'meta', value: { sandboxId, path: `${dir}/streamed` } } }
    for (let piece = 0; piece < 40; piece++) yield { content: { case: 'chunk', value: new Uint8Array(50_000).fill(piece) } }
  }
  await agent.writeFileStream(pieces())
  const back = Buffer.concat((await collect(agent.readFileStream({ sandboxId, path: `${dir}/streamed` }))).map((m) => Buffer.from(m.chunk)))
  assert.ok(back.length === 2_000_000 && back.every((byte, place) => byte === Math.floor(place / 50_000)))
  const entries = (await agent.listDir({ sandboxId, path: dir, depth: 1 })).entries
  seen.listDir = entries.map((entry) => [entry.name, entry.type, String(entry.size), entry.owner]).sort()
  await agent.removePath({ sandboxId, path: dir })
  await refused(agent.readFile({ sandboxId, path: `${dir}/whole` }), Code.NotFound)

  await agent.pingSandbox({ sandboxId })
  await eventually('samples', async () => (await agent.getSandboxMetrics({ sandboxId, range: '5m' })).points.length > 0)
  await refused(agent.getSandboxMetrics({ sandboxId, range: '7m' }), Code.InvalidArgument)
  seen.flushed = (await agent.flushSandboxMetrics({ sandboxId })).points10m.length > 0
  const list = await agent.listSandboxes({})
  seen.listed = list.sandboxes.map((sandbox) => [sandbox.sandboxId, sandbox.status, sandbox.memoryMb])
  await refused(agent.exec({ sandboxId: 'nobody', cmd: 'true' }), Code.NotFound)
  await refused(agent.exec({ sandboxId: '', cmd: 'true' }), Code.InvalidArgument)
  return seen
}

const ways = ['1.1', '2'].flatMap((version) => [true, false].map((binary) => [`HTTP/${version} ${binary ? 'binary' : 'JSON'}`, client(version, binary)]))
const [, agent] = ways[0]
const { sandboxId } = await agent.createSandbox({ memoryMb: 256 })
let first
for (const [name, way] of ways) {
  const seen = await look(way, sandboxId)
  first ??= seen
  assert.deepEqual(seen, first, name)
  console.log(`ok      ${name}`)
}
console.log(JSON.stringify(first))
assert.deepEqual(first.exec, ['out\n', 'err\n', 3])
assert.deepEqual(first.execStream, ['1\n2\n3\n', 4])
assert.deepEqual(first.connectProcess, ['begun\n', 143])

const team = '11111111-2222-3333-4444-555555555555'
const template = (n) => ({ teamId: team, templateId: `00000000-0000-0000-0000-00000000000${n}` })
const [, json] = ways[1]
assert.ok((await json.createSnapshot({ sandboxId, name: 'n', ...template(1) })).sizeBytes > 0n)
assert.ok((await agent.flattenRootfs({ sandboxId, name: 'n', ...template(2) })).sizeBytes > 0n)
await refused(agent.flattenRootfs({ sandboxId, name: 'n', ...template(2) }), Code.AlreadyExists)
await agent.pauseSandbox({ sandboxId })
assert.deepEqual((await json.listSandboxes({})).autoPausedSandboxIds, [sandboxId])
const resumed = await agent.resumeSandbox({ sandboxId })
assert.equal(resumed.status, 'running')
await json.deleteSnapshot(template(1))
await json.deleteSnapshot(template(2))
await agent.destroySandbox({ sandboxId })
await refused(agent.pingSandbox({ sandboxId }), Code.NotFound)
console.log('ok      lifecycle')
await agent.terminate({})
const missing = Object.values(HostAgentService.method).map((m) => m.name).filter((name) => !called.has(name))
assert.deepEqual(missing, [], 'procedures that were not called')
console.log(`all passed: ${called.size} procedures`)
process.exit(0)
