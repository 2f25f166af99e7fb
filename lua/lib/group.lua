-- group: a call about several steps of one run. Needs record.

-- Each step has its own arguments, including its name. The name of the first step is at `first` in ARGV; the names of
-- further steps are at `more` and every `count` after it. A call about one step has nothing at `more`.
-- Returns the positions of the names, and the fields to read: the state line of each step, and its mark if `with_marks`.
local function steps_of_call(first, more, count, with_marks)
  local positions, fields, read = { first }, {}, 0
  for position = more, #ARGV, count do
    positions[#positions + 1] = position
  end
  for index = 1, #positions do
    local step = ARGV[positions[index]]
    read = read + 1
    fields[read] = "s" .. step
    if with_marks then
      read = read + 1
      fields[read] = "w" .. step
    end
  end
  return positions, fields
end

-- The reply of the script, given a reply for each step after "each" and the nonce. A state line alone, which costs the
-- least, stands for `word`, the nonce and the line.
local function reply_of_steps(replies, word)
  if replies[4] then
    return replies
  end
  local reply = replies[3]
  return type(reply) == "string" and word .. " " .. nonce .. " " .. reply or reply
end
