-- group: a call about several steps of one run.
--
-- Each step has arguments of its own: those of the first step begin at `first`, those of further steps at `more`, with
-- `count` for each. A call about one step has nothing at `more`.

-- The positions in ARGV at which the arguments of each step begin.
local function positions_of_steps(first, more, count)
  local positions = { first }
  for position = more, #ARGV, count do
    positions[#positions + 1] = position
  end
  return positions
end
