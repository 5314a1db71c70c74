// E2B's JavaScript SDK against envd: what its users call, and what they are told when it fails.
//
// In its debug mode the SDK talks to http://localhost:49983 and to no control plane. `ROOST_USER` names who commands run as.
// Nothing here depends on how long something takes: what is waited for is looked for until it is there.

import assert from 'node:assert/strict'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { Sandbox } from 'e2b'

const PATIENCE_MS = 60_000
const as = { user: process.env.ROOST_USER }
const dir = await mkdtemp(path.join(tmpdir(), 'roost-sdk-'))
const sandbox = await Sandbox.create({ debug: true, apiKey: `e2b_${'0'.repeat(40)}` })
let failures = 0

async function test(name, body) {
  try {
    await body()
    console.log(`ok      ${name}`)
  } catch (error) {
    failures += 1
    console.log(`FAILED  ${name}\n${error.stack}`)
  }
}

async function eventually(what, look) {
  const deadline = Date.now() + PATIENCE_MS
  while (!(await look())) {
    assert.ok(Date.now() < deadline, `waited in vain for ${what}`)
    await new Promise((done) => setTimeout(done, 20))
  }
}

await test('health', async () => assert.equal(await sandbox.isRunning(), true))

await test('a command has output, error output and an exit code', async () => {
  const ended = await sandbox.commands.run('echo out; echo err >&2', as)
  assert.deepEqual([ended.stdout, ended.stderr, ended.exitCode], ['out\n', 'err\n', 0])
  await assert.rejects(sandbox.commands.run('exit 3', as), { name: 'CommandExitError', exitCode: 3 })
})

await test('a command has its environment and directory', async () => {
  const ended = await sandbox.commands.run('echo $COLOUR; pwd', { ...as, envs: { COLOUR: 'teal' }, cwd: dir })
  assert.equal(ended.stdout, `teal\n${dir}\n`)
})

await test('a command in the background is listed, fed, ended', async () => {
  const cat = await sandbox.commands.run('cat', { ...as, background: true, stdin: true })
  await sandbox.commands.sendStdin(cat.pid, 'typed\n')
  assert.ok((await sandbox.commands.list()).some((process) => process.pid === cat.pid))
  await eventually('what was typed', () => cat.stdout === 'typed\n')
  await sandbox.commands.closeStdin(cat.pid)
  assert.equal((await cat.wait()).exitCode, 0)
})

await test('a command is found again and killed', async () => {
  const sleep = await sandbox.commands.run('sleep 1000', { ...as, background: true })
  const again = await sandbox.commands.connect(sleep.pid)
  assert.equal(await sandbox.commands.kill(sleep.pid), true)
  await assert.rejects(again.wait(), { name: 'CommandExitError' })
  await assert.rejects(sleep.wait(), { name: 'CommandExitError' })
  assert.equal(await sandbox.commands.kill(sleep.pid), false)
})

await test('a command that takes too long is ended', async () => {
  await assert.rejects(sandbox.commands.run('sleep 1000', { ...as, timeoutMs: 500 }), { name: 'TimeoutError' })
})

await test('files are written, read, listed, renamed and removed', async () => {
  const at = (name) => path.join(dir, 'files', name)
  await sandbox.files.write(at('a.txt'), 'content', as)
  assert.equal(await sandbox.files.read(at('a.txt'), as), 'content')
  await sandbox.files.write([{ path: at('b.txt'), data: 'b' }, { path: at('c.txt'), data: 'c' }], as)
  const names = (await sandbox.files.list(at('.'), as)).map((entry) => entry.name).sort()
  assert.deepEqual(names, ['a.txt', 'b.txt', 'c.txt'])
  assert.equal(await sandbox.files.exists(at('a.txt'), as), true)
  assert.equal(await sandbox.files.exists(at('absent'), as), false)
  assert.equal(await sandbox.files.makeDir(at('below'), as), true)
  assert.equal(await sandbox.files.makeDir(at('below'), as), false)
  assert.equal((await sandbox.files.rename(at('a.txt'), at('z.txt'), as)).name, 'z.txt')
  assert.equal((await sandbox.files.getInfo(at('z.txt'), as)).size, 7)
  await sandbox.files.remove(at('z.txt'), as)
  await assert.rejects(sandbox.files.read(at('z.txt'), as), { name: 'FileNotFoundError' })
})

await test('a file of 5 MB comes back as it was', async () => {
  const bytes = new Uint8Array(5_000_000).map((_, place) => place % 251)
  await sandbox.files.write(path.join(dir, 'large'), bytes.buffer, as)
  const back = await sandbox.files.read(path.join(dir, 'large'), { ...as, format: 'bytes' })
  assert.ok(Buffer.from(back).equals(Buffer.from(bytes)))
})

await test('changes of a directory are told as they come', async () => {
  const events = []
  await sandbox.files.makeDir(path.join(dir, 'watched', 'below'), as)
  const watch = await sandbox.files.watchDir(path.join(dir, 'watched'), (event) => events.push(`${event.type} ${event.name}`), {
    ...as,
    recursive: true,
  })
  await sandbox.files.write(path.join(dir, 'watched', 'below', 'file'), 'x', as)
  await eventually('the write', () => events.includes('write below/file'))
  assert.ok(events.includes('create below/file'), events.join(', '))
  await watch.stop()
})

await test('a terminal has a size and takes keys', async () => {
  let shown = ''
  const onData = (data) => (shown += Buffer.from(data).toString())
  const terminal = await sandbox.pty.create({ ...as, cols: 91, rows: 31, onData })
  await sandbox.pty.sendInput(terminal.pid, Buffer.from('stty size\n'))
  await eventually('its size', () => shown.includes('31 91'))
  await sandbox.pty.resize(terminal.pid, { cols: 101, rows: 41 })
  await sandbox.pty.sendInput(terminal.pid, Buffer.from('stty size; exit\n'))
  await terminal.wait()
  assert.ok(shown.includes('41 101'), shown)
})

await test('an unknown user is the caller\'s mistake', async () => {
  await assert.rejects(sandbox.commands.run('true', { user: 'nobody-of-this-name' }), { name: 'InvalidArgumentError' })
})

await rm(dir, { recursive: true })
console.log(failures === 0 ? 'all passed' : `${failures} FAILED`)
process.exit(failures === 0 ? 0 : 1)
