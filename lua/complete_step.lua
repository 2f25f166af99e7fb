-- complete_step: ends claims with an output, appends their steps to the completion order, and schedules successors.
--
-- KEYS  1 steps, 2 done, 3 claims
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 token   of the claim, or ""  any claim
--       4 output
--       5 run     "<bytes in the run id>:<run id>", for the indexes
--       6 width   of the arguments for each successor: 3 with fingerprints, else 2; or ""  there are none
--       7 step, input, fingerprint, …  of successors: those without a record become pending, unless the run is cancelled;
--         or step, token, output, …  of further steps, each step once
-- REPLY "completed nonce state" | {"completed", nonce, state, input}  without a token
--       {"stale", nonce, state, input, output, error, progress} | {"missing", nonce}
--       {"each", nonce, reply, …}  of several steps: a reply for each, as above, or state, which stands for "completed nonce state"
-- Writes only when it first replies "completed".

local KEYS, ARGV, string, call, try = KEYS, ARGV, string, redis.call, redis.pcall -- locals cost less
local steps, done, claims = KEYS[1], KEYS[2], KEYS[3]
local SUCCESSORS = 6

-- The common case: a live claim without a mark, no successors, in a run that does not expire. The general path
-- below does the same at a higher cost.
local step, token = ARGV[2], ARGV[3]
local field = "s" .. step
local lines = not ARGV[SUCCESSORS] and try("HMGET", steps, "r", field, "w" .. step)
if lines and lines[1] and lines[2] and not lines[3] then
  local created, completed = string.match(lines[1], @READ_RUN .. "$")
  local claim, holder, lease, started, created_at, rest = string.match(lines[2], @READ_RUNNING)
  local count = try("ZCARD", done)
  if
    created
    and count == completed + 0
    and #created <= @MAX_DIGITS
    and holder == token
    and @ARE_SHORT(claim, holder, lease, started, created_at, rest)
    and (lease == "" or try("ZREM", claims, ARGV[5] .. step) == 1)
  then
    local time = call("TIME")
    local now = @NOW(time)
    completed = string.format("%d", count + 1)
    call("ZADD", done, completed, step)
    local span = now - created_at - started
    local ended = @DURATION(span)
    local line = @STATE(@COMPLETED, claim, "", started, ended, created_at, rest)
    call("HSET", steps, "r", @RUN(created, completed), field, line, "o" .. step, ARGV[4])
    return "completed " .. ARGV[1] .. " " .. line
  end
end

-- general path
-- include record
-- include run
-- include reply
-- include group

local successors = ARGV[SUCCESSORS] and ARGV[SUCCESSORS] ~= ""
local positions, fields = steps_of_call(2, successors and #ARGV + 1 or SUCCESSORS + 1, 3, true)
local run, lines, refusal = load_run(steps, done, unpack(fields))
@RETURN_REFUSAL
local now = now_ms()

-- include complete
-- include marks

local replies, members, marks = { "each", nonce }, {}, {}
for index = 1, #positions do
  local position, line = positions[index], lines[2 * index]
  local step, token, output = ARGV[position], ARGV[position + 1], ARGV[position + 2]
  local completed, lease
  if line then
    completed, lease = complete(step, fields[2 * index - 1], line, token, output)
  end
  if completed then
    replies[index + 2] = token ~= "" and completed or with_input("completed", completed, token, steps, step)
    if lease ~= "" then
      members[#members + 1] = ARGV[5] .. step
    end
    marks[step] = lines[2 * index + 1] or nil
  elseif line then
    local state = parse_state(line)
    if not state then
      return unreadable(steps, fields[2 * index - 1], line)
    end
    local resent = state.status == @COMPLETED and (token == state.token or token == "")
    if resent and redis.call("HGET", steps, "o" .. step) == output then
      replies[index + 2] = token ~= "" and line or with_input("completed", line, token, steps, step)
    else
      replies[index + 2] = with_record("stale", steps, step)
    end
  else
    replies[index + 2] = { "missing", nonce }
  end
end
if members[1] then
  -- The first write checks its own key: if it fails, nothing is written.
  local reply = redis.pcall("ZREM", claims, unpack(members))
  if type(reply) == "table" then
    return failed_call(claims, reply)
  end
end
if outputs[1] then
  if successors and not run.cancelled then
    -- include schedule
    local width = tonumber(ARGV[SUCCESSORS])
    local missing = without_record(steps, SUCCESSORS + 1, width, "")
    write_pending(run, steps, missing, width, "", now)
  end
  write_completed()
end
for step, mark in pairs(marks) do
  settle_mark(steps, step, mark, true)
end
return reply_of_steps(replies, "completed")
