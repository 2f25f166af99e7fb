-- run: the writing of a run's line, and the expiry that its two keys share. Needs record.

local function format_run(run)
  local line = FORMAT .. " " .. run.created .. " " .. run.completed
  if run.ttl then
    line = line .. " " .. run.ttl .. " " .. run.unleased .. " " .. run.hold
  end
  return line
end

-- The run is to expire `ttl` after each write; "" for not at all.
local function set_ttl(run, ttl)
  if ttl ~= "" then
    run.ttl, run.unleased, run.hold = ttl, 0, 0
  end
end

-- A claim of the step begins or is renewed: the run must outlive it.
local function hold(run, lease, started)
  if not run.ttl then
    return
  end
  if lease == "" then
    run.unleased = run.unleased + 1
  else
    run.hold = math.max(run.hold, started + lease)
  end
end

-- The step's live claim ends or is about to be renewed. A lease needs no more than its place in run.hold.
local function unhold(run, state)
  if run.ttl and state.lease == "" then
    run.unleased = math.max(0, run.unleased - 1)
  end
end

-- Both keys expire together, ttl after the run's last write, and never while a claim is live.
local function renew_expiry(run, steps, done, now)
  if not run.ttl then
    return
  end
  if tonumber(run.unleased) > 0 then
    redis.call("PERSIST", steps)
    redis.call("PERSIST", done)
  else
    local at = math.max(now, run.hold) + run.ttl
    redis.call("PEXPIREAT", steps, at)
    redis.call("PEXPIREAT", done, at)
  end
end
