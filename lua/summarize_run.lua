-- summarize_run: reads the state lines of a run's unfinished steps, one page at a time, without payloads.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
--       2 cursor  "0" for the first page, then as replied
--       3 count   of fields to scan for this page, approximately
-- REPLY {"summary", nonce, cursor, created, completed, last, {step, state, …}, labels, entered, reason}
--       last: state of the last completed step, or ""; labels: as stored, or ""; entered: when the run was created, in ms, or ""
--       if the index does not say; reason: of the cancellation, nil unless the run is cancelled
--       {"missing", nonce}
-- Writes nothing.

-- include record
-- include runs
-- include walk
-- include bulk

local steps, done, cursor, count = KEYS[1], KEYS[2], ARGV[2], ARGV[3]
@OPEN_EXISTING_RUN

local newest = redis.call("ZRANGE", done, -1, -1)[1]
local last = newest and redis.call("HGET", steps, "s" .. newest) or ""
local labels = redis.call("HGET", steps, "l") or ""
local bucket, run_id = @PLACE(steps)
local entered = redis.pcall("ZSCORE", bucket .. "runs", @RUN_MEMBER(run_id, labels))
entered = type(entered) == "string" and entered or ""
local reason = run.cancelled and (redis.call("HGET", steps, "c") or "") or nil
if tonumber(run.created) == tonumber(run.completed) then
  return { "summary", nonce, "0", run.created, run.completed, last, {}, labels, entered, reason }
end

local fields, unfinished = nil, {}
cursor, fields = walk(steps, cursor, count)
for index, line in ipairs(read_fields(steps, fields)) do
  if string.sub(line, 2, 2) ~= @COMPLETED then
    unfinished[#unfinished + 1] = string.sub(fields[index], 2)
    unfinished[#unfinished + 1] = line
  end
end
return { "summary", nonce, cursor, run.created, run.completed, last, unfinished, labels, entered, reason }
