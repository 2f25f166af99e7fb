-- import_run: makes a run of what was exported, all of it or nothing.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 claims  sorted set  leased claims of the bucket, by the end of their lease
--       4 failed  sorted set  failed steps of the bucket, by the time of the failure
-- ARGV  1 nonce      made for this call alone; it stays on the run and tells a re-sent call from a second one
--       2 run        "<bytes in the run id>:<run id>", for the indexes
--       3 ttl_ms     or ""  the run does not expire
--       4 made       steps
--       5 completed  steps
--       6 step, …    the completed ones, in their order; behind them field, value, … of all records
-- REPLY {"imported", nonce} | {"exists", nonce}
-- Writes only when it replies "imported" for the first time.

-- include record
-- include run
-- include indexes

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local FIRST = 6
local CHUNK = 1000 -- arguments of one redis.call; Lua's stack takes about 8,000

local run, _, refusal = load(steps, done)
if refusal then
  return refusal
end
if run.exists then
  return { redis.call("HGET", steps, "m") == nonce and "imported" or "exists", nonce }
end
refusal = check_indexes(claims, failed)
if refusal then
  return refusal
end
run.created, run.completed = ARGV[4], ARGV[5]
set_ttl(run, ARGV[3])
local fields = FIRST + run.completed
local states = {}
for position = fields, #ARGV, 2 do
  if string.sub(ARGV[position], 1, 1) == "s" then
    local state = parse_state(ARGV[position + 1])
    if not state then
      return unreadable(steps, ARGV[position], ARGV[position + 1])
    end
    state.member = ARGV[2] .. string.sub(ARGV[position], 2)
    states[#states + 1] = state
  end
end

for _, state in ipairs(states) do
  local started = state.created + (tonumber(state.started) or 0)
  if state.status == RUNNING then
    hold(run, state.lease, started)
    if state.lease ~= "" then
      redis.call("ZADD", claims, started + state.lease, state.member)
    end
  elseif state.status == FAILED or state.status == EXPIRED then
    index_failed(failed, state.member, started + (tonumber(state.ended) or 0))
  end
end
for first = FIRST, fields - 1, CHUNK do
  local members = {}
  for position = first, math.min(first + CHUNK, fields) - 1 do
    members[#members + 1] = position - FIRST + 1
    members[#members + 1] = ARGV[position]
  end
  redis.call("ZADD", done, unpack(members))
end
for first = fields, #ARGV, 2 * CHUNK do
  redis.call("HSET", steps, unpack(ARGV, first, math.min(first + 2 * CHUNK - 1, #ARGV)))
end
redis.call("HSET", steps, "r", format_run(run), "m", nonce)
renew_expiry(run, steps, done, now_ms())
return { "imported", nonce }
