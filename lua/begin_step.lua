-- begin_step: claims a step for one delivery, or says why it must be skipped.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 claims  sorted set  leased claims of the bucket, by the end of their lease
--       4 failed  sorted set  failed steps of the bucket, by the time of the failure
-- ARGV  1 token   made for this call alone; it becomes the claim's, and tells a re-sent call from a second one
--       2 step
--       3 run     "<bytes in the run id>:<run id>", for the indexes
--       4 input   of the caller: kept unless the step was scheduled with its own
--       5 lease_ms      or ""  the claim never ends by itself; the rest may be left out from the end
--       6 owner         or ""
--       7 ttl_ms        or ""  for a run that this call makes
--       8 max_attempts  or ""  any number
--       9 lapse_error   last error of a step whose claim lapsed with no attempt left; comes with max_attempts
-- REPLY "execute nonce state" | {"execute", nonce, state, input}  where the input kept is not the caller's
--       {"takeover", nonce, state, input}  likewise, of a claim whose lease had ended
--       {"completed" | "exhausted" | "superseded", nonce, state, input, output, error}
--       {"busy", nonce, state, input, output, error, remaining_ms | ""}
-- Writes only when it replies "execute" for the first time, or "takeover", or turns a lapsed claim into a failure ("exhausted").

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local token, step, input, lease, owner = ARGV[1], ARGV[2], ARGV[4], ARGV[5], ARGV[6] or ""

-- The common case: a new step of a run that does not expire. What follows does the same, at greater cost, and all else.
local lines = redis.pcall("HMGET", steps, "r", "s" .. step)
if not lines.err and lines[1] and not lines[2] then
  local created, completed = string.match(lines[1], "^1 (%d+) (%d+)$")
  if created and redis.pcall("ZCARD", done) == tonumber(completed) then
    local time = redis.call("TIME")
    local now = time[1] .. string.sub("00000" .. time[2], -6, -4)
    if lease == "" or type(redis.pcall("ZADD", claims, now + lease, ARGV[3] .. step)) == "number" then
      created = created + 1 .. ""
      local line = "1r 1  " .. token .. " " .. lease .. " 0  " .. now .. " " .. created .. "  " .. owner
      redis.call("HSET", steps, "r", "1 " .. created .. " " .. completed, "s" .. step, line, "i" .. step, input)
      return "execute " .. token .. " " .. line
    end
  end
end

-- include record
-- include run

local run, state, refusal = load(steps, done, step)
if refusal then
  return refusal
end
local now = now_ms()

-- include begin
