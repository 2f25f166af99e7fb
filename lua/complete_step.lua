-- complete_step: ends a claim with an output, gives the step its place in the order, and schedules what follows.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 claims  sorted set  leased claims of the bucket, by the end of their lease
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 run     "<bytes in the run id>:<run id>", for the indexes
--       4 token   of the claim, or ""  for whoever holds it
--       5 output
--       6 step, 7 input, …  successors: those without a record become pending
-- REPLY "completed nonce state" | {"completed", nonce, state, input}  without a token
--       {"stale", nonce, state, input, output, error}
--       {"missing", nonce}
-- Writes only when it replies "completed" for the first time.

local steps, done, claims = KEYS[1], KEYS[2], KEYS[3]
local step, token, output = ARGV[2], ARGV[4], ARGV[5]
local SUCCESSORS = 6

-- The common case: a claim in hand, no successors, nobody waiting, in a run that does not expire. What follows does the same, at
-- greater cost, and all else.
local lines = redis.pcall("HMGET", steps, "r", "s" .. step, "w" .. step)
if lines[1] and lines[2] and not lines[3] and not ARGV[SUCCESSORS] then
  local created, completed = string.match(lines[1], "^1 (%d+) (%d+)$")
  local claim, holder, lease, started, made, rest =
    string.match(lines[2], "^1r (%d+ %d* (%S+)) (%d*) (%d*)  (%d+)( %d+ %S* .*)$")
  if
    created
    and holder == token
    and redis.pcall("ZCARD", done) == tonumber(completed)
    and (lease == "" or type(redis.pcall("ZREM", claims, ARGV[3] .. step)) == "number")
  then
    local time = redis.call("TIME")
    local now = time[1] .. string.sub("00000" .. time[2], -6, -4)
    local ended = math.max(0, now - made - started)
    completed = completed + 1 .. ""
    redis.call("ZADD", done, completed, step)
    local line = "1c " .. claim .. "  " .. started .. " " .. ended .. " " .. made .. rest
    redis.call("HSET", steps, "r", "1 " .. created .. " " .. completed, "s" .. step, line, "o" .. step, output)
    return "completed " .. ARGV[1] .. " " .. line
  end
end

-- include record
-- include run

local run, state, refusal = load(steps, done, step)
if refusal then
  return refusal
end
if not state then
  return { "missing", nonce }
end

if holds(state, token) then
  if state.lease ~= "" then
    -- The first write checks its own key: nothing is written if this fails.
    local answer = redis.pcall("ZREM", claims, ARGV[3] .. step)
    if type(answer) == "table" then
      return failed_call(claims, answer)
    end
  end
  local now = now_ms()
  if ARGV[SUCCESSORS] then
    -- include schedule
    local missing = without_record(steps, SUCCESSORS, "")
    write_pending(run, steps, missing, "", now)
  end
  -- include complete
  local line = complete(run, state, steps, done, step, output, now)
  -- include wake
  wake(state, steps, step)
  return { "completed", nonce, line, token == "" and redis.call("HGET", steps, "i" .. step) or nil }
end

-- include reply

if state.status == COMPLETED and (token == state.token or token == "") then
  if redis.call("HGET", steps, "o" .. step) == output then
    return { "completed", nonce, state.line, token == "" and redis.call("HGET", steps, "i" .. step) or nil }
  end
end
return with_record("stale", steps, step)
