-- complete: ends a claim with an output and appends the step to the completion order. Needs record and run.

-- Writes the run line, too. Returns the state line.
local function complete(run, state, steps, done, step, output, now)
  unretain(run, state)
  run.completed = run.completed + 1 .. ""
  redis.call("ZADD", done, run.completed, step)
  end_attempt(state, @COMPLETED, now)
  local line = format_state(state)
  redis.call("HSET", steps, "r", format_run(run), "s" .. step, line, "o" .. step, output)
  renew_expiry(run, steps, done, now)
  return line
end
