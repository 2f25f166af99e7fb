-- list_runs: lists runs of one bucket, newest first, or counts them.
--
-- KEYS  1 runs    sorted set  the runs of the bucket, by the time of their creation
-- ARGV  1 nonce   of this call, echoed
--       2 newest  ms  of the first run to look at, or "+inf"
--       3 skip    how many runs of exactly that time to skip
--       4 oldest  ms  of the last run to look at, or "-inf"
--       5 limit   how many to list; with `status`, how many to look at; or "0"  only count, including entries of runs that are gone
--       6 prefix  of the run ids, or ""
--       7 status  letters of state lines: only runs with such a step, and large runs that may have one; or ""; ignored to count
--       8 label, …  "<name>=<value>": only runs with all of them
-- REPLY {"runs", nonce, newest, skip, count, {member, ms, …}, work}  newest and skip: for the next call; newest is "" after the
--       last run; count: runs that were counted or looked at; work: how many entries could have been scanned in the same time
-- Writes only hints: it drops entries of runs that are gone or have other labels.

-- include record
-- include runs
-- include walk
-- include bulk

local index, newest, skip, oldest, limit, prefix = KEYS[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5]), ARGV[6]
local letters = ARGV[7]
local FIRST = 8
local MAX_WORK = 1000 -- of one call, in entries scanned in the same time
local CALL, LOOK, STEPS, STEP = 16, 5, 10, 2 -- a call (as in pacing.py), looking at a run, at its steps, and at each of them
local MAX_FIELDS = 60 -- that are read from one run
local bucket = string.sub(index, 1, -5)

if limit == 0 and prefix == "" and not ARGV[FIRST] then
  local count = redis.pcall("ZCOUNT", index, oldest, newest)
  return type(count) == "table" and failed_call(index, count) or { "runs", nonce, "", 0, count, {}, CALL }
end

if skip > 0 then -- some may have been deleted since
  local ties = redis.pcall("ZCOUNT", index, newest, newest)
  if type(ties) == "table" then
    return failed_call(index, ties)
  end
  skip = math.min(skip, ties)
end

local needles = {} -- each label, with the line breaks around it
for position = FIRST, #ARGV do
  needles[#needles + 1] = "\n" .. ARGV[position] .. "\n"
end

local function has_labels(lines)
  for index = 1, #needles do
    if not string.find(lines, needles[index], 1, true) then
      return false
    end
  end
  return true
end

-- Whether a member may belong to a wanted run. Most members do not, so it does not parse them.
local function may_be_wanted(member)
  if prefix ~= "" then
    local colon = string.find(member, ":", 1, true) or 0
    if string.sub(member, colon + 1, colon + #prefix) ~= prefix then
      return false
    end
  end
  return not needles[1] or has_labels(member .. "\n")
end

local looked, work = 0, CALL

-- Whether a run may have a step of the status.
local function may_have_step(steps, created, completed)
  if letters == @COMPLETED then
    return completed ~= "0"
  end
  if created == completed then
    return false
  end
  local cursor, fields = walk(steps, "0", MAX_FIELDS)
  work = work + STEPS + STEP * #fields
  for _, line in ipairs(read_fields(steps, fields)) do
    if string.find(letters, string.sub(line, 2, 2), 1, true) then
      return true
    end
  end
  return cursor ~= "0"
end

-- Looks at the run of an entry. Returns whether the run is gone, or had other labels; and whether it is wanted. EXISTS gets
-- two keys: while a slot migrates, the server then refuses it if one of them may be on the other server.
local function look_at(run_id, labels)
  looked, work = looked + 1, work + LOOK
  local steps = bucket .. run_id .. ":steps"
  local lines = redis.pcall("HMGET", steps, "r", "l")
  local line = lines[1]
  if lines.err or not line then
    return redis.pcall("EXISTS", index, steps) == 1, true -- a run of another type is shown as corrupt
  end
  if (lines[2] or "") ~= labels or string.find(line, "^" .. @TOMBSTONE("")) then
    return true
  end
  local created, completed = string.match(line, @READ_RUN)
  return false, letters == "" or not created or may_have_step(steps, created, completed)
end

local found, count, page, is_full, has_more = {}, 0, nil, false, nil
local is_selective = prefix ~= "" or ARGV[FIRST]
local size = (is_selective or limit == 0) and 200 or math.min(limit, MAX_WORK) + 1 -- one more shows whether it is the last
repeat
  page = redis.pcall("ZREVRANGEBYSCORE", index, newest, oldest, "WITHSCORES", "LIMIT", skip, size)
  if page.err then
    return failed_call(index, page)
  end
  for position = 1, #page, 2 do
    local member, ms = page[position], page[position + 1]
    newest, skip = ms, ms == newest and skip + 1 or 1
    local is_stale, wanted = false, not is_selective or may_be_wanted(member)
    if wanted then
      local run_id, labels = parse_run_member(member)
      wanted = run_id and has_labels("\n" .. labels .. "\n")
      is_stale = not run_id
      if wanted and limit > 0 then
        is_stale, wanted = look_at(run_id, labels)
      end
    end
    if is_stale then
      if type(redis.pcall("ZREM", index, member)) == "number" then
        skip = skip - 1
      end
    elseif wanted then
      count = count + 1
      if limit > 0 then
        found[#found + 1], found[#found + 2] = member, ms
      end
    end
    is_full = limit > 0 and (letters == "" and count or looked) == limit
    has_more = position + 1 < #page
    if is_full then
      break
    end
  end
  has_more = #page == 2 * size or is_full and has_more
  work = work + #page * (prefix == "" and 0.5 or 0.75) -- comparing a prefix takes longer
until not has_more or work >= MAX_WORK or is_full
if not has_more then
  newest = ""
end
return { "runs", nonce, newest, skip, letters == "" and count or looked, found, work }
