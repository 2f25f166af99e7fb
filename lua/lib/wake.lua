-- wake: tells those who wait for a step that it is over. Needs record.
--
-- The one key that is not in KEYS: named there, and missing as it mostly is, it would have a server that hands the slot
-- over to another refuse the call. It lies in the same slot, and no error of it matters: it is a hint.

local WAKE_MS = 60000 -- that a wake-up is there to be found; who waits looks again long before

local function wake_key(steps)
  return string.sub(steps, 1, -#"steps" - 1) .. "wake"
end

local function wake(state, steps, step)
  if state.awaited then
    redis.call("HDEL", steps, "w" .. step)
    redis.pcall("XADD", wake_key(steps), "MAXLEN", "~", 100, "*", "step", step)
    redis.pcall("PEXPIRE", wake_key(steps), WAKE_MS)
  end
end
