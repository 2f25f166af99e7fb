-- complete: the end of a claim with an output, and its place in the order. Needs record and run.

-- Writes the run's line too. Answers the state line.
local function complete(run, state, steps, done, step, output, now)
  unhold(run, state)
  run.completed = run.completed + 1 .. ""
  redis.call("ZADD", done, run.completed, step)
  end_attempt(state, COMPLETED, now)
  local line = format_state(state)
  redis.call("HSET", steps, "r", format_run(run), "s" .. step, line, "o" .. step, output)
  renew_expiry(run, steps, done, now)
  return line
end
