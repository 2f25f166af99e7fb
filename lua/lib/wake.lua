-- wake: tells those who wait for a step that it is over. Needs record.

local WAKE_MS = 60000 -- that a wake-up is there to be found; who waits looks again long before

-- A hint: no error of it matters, for who waits looks again by itself.
local function wake(state, steps, key, step)
  if state.awaited then
    redis.call("HDEL", steps, "w" .. step)
    redis.pcall("XADD", key, "MAXLEN", "~", 100, "*", "step", step)
    redis.pcall("PEXPIRE", key, WAKE_MS)
  end
end
