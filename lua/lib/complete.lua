-- complete: ends claims with an output and appends their steps to the completion order. Needs record and run.
--
-- Reads run and now, both loaded.

local order, outputs = {}, {} -- of completed steps
local same_start, same_created, ended -- steps that were begun together have been running for the same time

-- Completes a step whose state line shows a claim that `token` holds. Returns the new state line, and the lease that has
-- ended; or nil. `write_completed` writes it.
local function complete(step, field, line, token, output)
  local claim, holder, lease, started, created, rest = string.match(line, @READ_RUNNING)
  if not claim or holder ~= token and token ~= "" then
    return nil
  end
  if not @ARE_SHORT(claim, holder, lease, started, created, rest) and not parse_state(line) then
    return nil
  end
  unretain(run, lease)
  local completed, count = run.completed + 1, #order
  run.completed = completed
  order[count + 1] = completed
  order[count + 2] = step
  if started ~= same_start or created ~= same_created then
    local span = now - created - started
    same_start, same_created, ended = started, created, @DURATION(span)
  end
  line = @STATE(@COMPLETED, claim, "", started, ended, created, rest)
  outputs[2 * count + 1] = field
  outputs[2 * count + 2] = line
  outputs[2 * count + 3] = "o" .. step
  outputs[2 * count + 4] = output
  return line, lease
end

local function write_completed()
  redis.call("ZADD", done, unpack(order))
  redis.call("HSET", steps, "r", format_run(run), unpack(outputs))
  renew_expiry(run, steps, done, now)
end
