-- runs: the index of the runs of a bucket, by the time of their creation. Needs record.
--
-- `runs` is not in KEYS: it would cost every call, and only a call that creates or deletes a run writes it. This is safe
-- while a slot migrates. The two keys of a new run do not exist, and the server then refuses a script if some of its KEYS
-- exist and others do not, or refers it to the other server, which refuses it, too.

-- A member of the index. If the run has labels, a line "<name>=<value>" for each follows the run id.
-- define RUN_MEMBER(run_id, labels) #run_id .. ":" .. run_id .. (labels == "" and "" or "\n" .. labels)

-- The prefix of the keys of a bucket, and the run id, from the key `steps`.
-- define PLACE(steps) string.match(steps, "^([^{]*{%x+}:)(.*):steps$")

-- Returns the run id and the labels; nil if the text is not such a member.
local function parse_run_member(member)
  local length, rest = string.match(member, "^([1-9]%d*):(.+)$")
  local labels = length and string.sub(rest, length + 1)
  if not labels or #rest < tonumber(length) or labels ~= "" and not string.find(labels, "^\n.") then
    return nil
  end
  return string.sub(rest, 1, length), string.sub(labels, 2)
end

-- The run is about to be deleted. The entry stays if the server rejects this write, and then its readers drop it.
local function drop_run(steps)
  local bucket, run_id = @PLACE(steps)
  local labels = redis.pcall("HGET", steps, "l") or ""
  redis.pcall("ZREM", bucket .. "runs", type(labels) == "string" and @RUN_MEMBER(run_id, labels))
end
