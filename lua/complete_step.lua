-- complete_step: ends a claim with an output, appends the step to the completion order, and schedules its successors.
--
-- KEYS  1 steps, 2 done, 3 claims
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 run     "<bytes in the run id>:<run id>", for the indexes
--       4 token   of the claim, or ""  any claim
--       5 output
--       6 step, 7 input, …  successors: those without a record become pending
-- REPLY "completed nonce state" | {"completed", nonce, state, input}  without a token
--       {"stale", nonce, state, input, output, error} | {"missing", nonce}
-- Writes only when it first replies "completed".

local steps, done, claims = KEYS[1], KEYS[2], KEYS[3]
local step, token, output = ARGV[2], ARGV[4], ARGV[5]
local SUCCESSORS = 6

-- The common case: a live claim, no successors and no waiting client, in a run that does not expire. The general path
-- below does the same at a higher cost.
local lines = redis.pcall("HMGET", steps, "r", "s" .. step, "w" .. step)
if lines[1] and lines[2] and not lines[3] and not ARGV[SUCCESSORS] then
  local created, completed = string.match(lines[1], @READ_RUN .. "$")
  local claim, holder, lease, started, created_at, rest = string.match(lines[2], @READ_RUNNING)
  if
    created
    and holder == token
    and redis.pcall("ZCARD", done) == tonumber(completed)
    and (lease == "" or type(redis.pcall("ZREM", claims, ARGV[3] .. step)) == "number")
  then
    local time = redis.call("TIME")
    local now = @NOW(time)
    completed = completed + 1 .. ""
    redis.call("ZADD", done, completed, step)
    local ended = @DURATION(now, created_at, started)
    local line = @STATE(@COMPLETED, claim, "", started, ended, created_at, rest)
    redis.call("HSET", steps, "r", @RUN(created, completed), "s" .. step, line, "o" .. step, output)
    return "completed " .. ARGV[1] .. " " .. line
  end
end

-- include record
-- include run
-- include reply

@OPEN_EXISTING_STEP

if holds(state, token) then
  if state.lease ~= "" then
    -- The first write checks its own key: if it fails, nothing is written.
    local reply = redis.pcall("ZREM", claims, ARGV[3] .. step)
    if type(reply) == "table" then
      return failed_call(claims, reply)
    end
  end
  local now = now_ms()
  if ARGV[SUCCESSORS] then
    -- include schedule
    write_pending(run, steps, without_record(steps, SUCCESSORS, ""), "", now)
  end
  -- include complete
  local line = complete(run, state, steps, done, step, output, now)
  -- include notify
  notify(state, steps, step)
  return with_input("completed", line, token, steps, step)
end

if state.status == @COMPLETED and (token == state.token or token == "") then
  if redis.call("HGET", steps, "o" .. step) == output then
    return with_input("completed", state.line, token, steps, step)
  end
end
return with_record("stale", steps, step)
