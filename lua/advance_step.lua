-- advance_step: completes a step and claims the next one of its run: complete_step and begin_step in one.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 claims  sorted set  leased claims of the bucket, by the end of their lease
--       4 failed  sorted set  failed steps of the bucket, by the time of the failure
-- ARGV  1 token   of the next claim, to 9 lapse_error: as of begin_step, for the next step
--       2 step, 3 run, 4 input, 5 lease_ms, 6 owner, 7 ttl_ms, 8 max_attempts, 9 lapse_error
--       10 from    the step to complete
--       11 held    token of the claim on it, or ""  for whoever holds it
--       12 output  of it
-- REPLY as begin_step, about the next step, once the first is completed:
--       "execute nonce state" | {"execute", nonce, state, input} | {"takeover", nonce, state, input}
--       {"completed" | "exhausted" | "superseded", nonce, state, input, output, error}
--       {"busy", nonce, state, input, output, error, remaining_ms | ""}
--       {"stale", nonce, state, input, output, error} | {"missing", nonce}  about the step to complete
-- Writes only when it completes the first step for the first time, or as begin_step. It then does both or neither.

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local token, step, input, lease, owner = ARGV[1], ARGV[2], ARGV[4], ARGV[5], ARGV[6] or ""
local from, held, output = ARGV[10], ARGV[11], ARGV[12]

-- The common case: a claim in hand, nobody waiting, a new step next, in a run that does not expire. What follows does
-- the same, at greater cost, and all else.
local lines = redis.pcall("HMGET", steps, "r", "s" .. from, "w" .. from, "s" .. step)
if lines[1] and lines[2] and not lines[3] and not lines[4] then
  local created, completed = string.match(lines[1], "^1 (%d+) (%d+)$")
  local claim, holder, ends, started, made, rest =
    string.match(lines[2], "^1r (%d+ %d* (%S+)) (%d*) (%d*)  (%d+)( %d+ %S* .*)$")
  if created and holder == held and redis.pcall("ZCARD", done) == tonumber(completed) then
    local time = redis.call("TIME")
    local now = time[1] .. string.sub("00000" .. time[2], -6, -4)
    if
      (ends == "" or type(redis.pcall("ZREM", claims, ARGV[3] .. from)) == "number")
      and (lease == "" or type(redis.pcall("ZADD", claims, now + lease, ARGV[3] .. step)) == "number")
    then
      created, completed = created + 1 .. "", completed + 1 .. ""
      redis.call("ZADD", done, completed, from)
      local ended = "1c " .. claim .. "  " .. started .. " " .. math.max(0, now - made - started) .. " " .. made .. rest
      local line = "1r 1  " .. token .. " " .. lease .. " 0  " .. now .. " " .. created .. "  " .. owner
      local run = "1 " .. created .. " " .. completed
      redis.call("HSET", steps, "r", run, "s" .. from, ended, "o" .. from, output, "s" .. step, line, "i" .. step, input)
      return "execute " .. token .. " " .. line
    end
  end
end

-- include record
-- include run

local run, ended, refusal = load(steps, done, from)
if refusal then
  return refusal
end
if not ended then
  return { "missing", nonce }
end
local line = redis.call("HGET", steps, "s" .. step)
local state = line and parse_state(line)
if line and not state then
  return unreadable(steps, "s" .. step, line)
end
local now = now_ms()

-- include reply
-- include indexes
-- include complete

if holds(ended, held) then
  -- An index in which nothing will change is not looked at.
  if state or lease ~= "" or ended.lease ~= "" then
    refusal = check_indexes(claims, state and failed or nil)
    if refusal then
      return refusal
    end
  end
  if ended.lease ~= "" then
    redis.call("ZREM", claims, ARGV[3] .. from)
  end
  complete(run, ended, steps, done, from, output, now)
  -- include wake
  wake(ended, steps, from)
else
  local again = ended.status == COMPLETED and (held == ended.token or held == "")
  if not again or redis.call("HGET", steps, "o" .. from) ~= output then
    return with_record("stale", steps, from)
  end
end

-- include begin
