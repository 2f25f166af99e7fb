-- import_run: creates a run from an export, or as a fork of another run, completely or not at all.
--
-- KEYS  1 steps, 2 done, 3 claims, 4 failed
-- ARGV  1 nonce      of this call only; the run stores it, so that a re-sent call is recognized
--       2 run        "<bytes in the run id>:<run id>", for the indexes
--       3 new_run    what the run gets: "" or ttl_ms, then a space and labels if it gets any
--       4 created    steps created
--       5 completed  steps completed
--       6 step, …    the completed steps, in their order; after them field, value, … of all records
-- REPLY {"imported", nonce} | {"exists", nonce}
-- Writes only when it first replies "imported".

-- include record
-- include run
-- include new_run
-- include indexes
-- include bulk

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local FIRST = 6
@OPEN_RUN

if run.exists then
  return { redis.call("HGET", steps, "m") == nonce and "imported" or "exists", nonce }
end
@CHECK_INDEXES(claims, failed)
run.created, run.completed = ARGV[4], ARGV[5]
set_up(run, ARGV[3])
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
  run.cancelled = run.cancelled or ARGV[position] == "c"
end

local now = now_ms()
refusal = enter_if_new(run, steps, now)
@RETURN_REFUSAL
for _, state in ipairs(states) do
  local started = state.created + (tonumber(state.started) or 0)
  if state.status == @RUNNING then
    retain(run, state.lease, started)
    if state.lease ~= "" then
      redis.call("ZADD", claims, started + state.lease, state.member)
    end
  elseif @IS_FAILURE(state.status) then
    if state.lease ~= "" then
      retain(run, state.lease, started)
    end
    index_failed(failed, state.member, started + (tonumber(state.ended) or 0))
  end
end
local members = {}
for position = FIRST, fields - 1 do
  members[#members + 1] = position - FIRST + 1
  members[#members + 1] = ARGV[position]
end
write_chunks("ZADD", done, members)
write_chunks("HSET", steps, ARGV, fields)
redis.call("HSET", steps, "r", format_run(run), "m", nonce)
renew_expiry(run, steps, done, now)
return { "imported", nonce }
