-- Lands a flight: its claim ends, and what it fetched is kept unless something newer stands there
-- (src/shared/cache.rs).
--
-- KEYS[1]  the answer; KEYS[2]  the claim on its flight
-- ARGV     whose claim ends ('': nobody's); the answer ('': none); for how long it is kept in ms; the most memory, in
--          bytes, that the server may use for one more to be kept; what the names of answers begin with; for how long
--          in ms, where none was kept, each is to fetch the answer for itself (0: one for all again)
-- returns  'stored', 'older', 'full' or 'released'; how many answers made room

local function get(key)
  local value = redis.pcall('GET', key)
  return type(value) == 'string' and value
end

local ends = ARGV[1] ~= '' and get(KEYS[2]) == ARGV[1]
if ends then
  redis.call('UNLINK', KEYS[2])
end

local function nothing(result, evicted)
  if ends and ARGV[6] ~= '0' then
    redis.call('SET', KEYS[2], 'each', 'PX', ARGV[6])
  end
  return {result, evicted}
end
if ARGV[2] == '' then
  return nothing('released', 0)
end

local function read(value)
  local stage, live, asked, received = string.match(value, '^(%d) ([01]) (%d+) (%d+) ')
  if stage then
    stage = tonumber(stage)
    return {
      stage = stage,
      asked = tonumber(asked),
      received = tonumber(received),
      has_ended = live == '0' and stage > 0,
    }
  end
end

-- A late answer takes nothing back (Answer::replaces). A not-found answer takes the place of a live one that was asked
-- for earlier: it says more than a state that is stale.
local stands, new = get(KEYS[1]), read(ARGV[2])
stands = stands and read(stands)
local clock = redis.call('TIME')
-- But for one that was written before this clock was set back: it would be the newer one for as long. In ms, as in
-- look.lua.
local AHEAD = 250
local is_ahead = stands and not stands.has_ended and stands.received > clock[1] * 1000 + clock[2] / 1000 + AHEAD
if stands and not is_ahead then
  local is_newer = new.asked >= stands.asked
  if new.stage == 0 then
    is_newer = is_newer and not stands.has_ended
  elseif new.stage ~= stands.stage then
    local is_last_word = not stands.has_ended and new.asked >= stands.received
    is_newer = is_last_word or new.stage > stands.stage
  end
  if not is_newer then
    return {'older', 0}
  end
end

-- Where there is too much, the answer of a few that nobody has read for longest goes, several times.
local function is_full()
  return tonumber(string.match(redis.call('INFO', 'memory'), 'used_memory:(%d+)')) >= tonumber(ARGV[4])
end
local evicted = 0
while evicted < 4 and is_full() do
  local idlest, longest
  for _ = 1, 5 do
    local key = redis.call('RANDOMKEY')
    if key and string.sub(key, 1, #ARGV[5]) == ARGV[5] then
      -- Under an LFU policy there is no such time.
      local idle = redis.pcall('OBJECT', 'IDLETIME', key)
      idle = type(idle) == 'number' and idle or 0
      if not longest or idle > longest then
        idlest, longest = key, idle
      end
    end
  end
  if not idlest then
    break
  end
  redis.call('UNLINK', idlest)
  evicted = evicted + 1
end
if is_full() then
  return nothing('full', evicted)
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {'stored', evicted}
