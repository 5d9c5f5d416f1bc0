-- Looks for an answer and, where none will do, claims the flight that fetches it (src/shared/cache.rs).
--
-- KEYS[1]  the answer; KEYS[2]  the claim on its flight
-- ARGV     'look' (nothing is claimed), 'claim', or 'insist' (whatever stands there will not do); who claims, and for
--          how long in ms; how old a live answer may be in ms; when the answer that the caller has was asked for (ms
--          since 1970, 0: none); how the answer begins that could not be opened ('': none)
-- returns  the time in µs; the answer, if it is newer than the caller's or tells that the task has ended ('': none, or
--          none of which it is known how old it is); whose the flight is: 'none', for an answer stands there that will
--          do, 'ours', 'theirs', or 'each', for each fetches it for itself

local function get(key)
  local value = redis.pcall('GET', key)
  if type(value) == 'table' then
    -- No string: whatever it is, it is not ours.
    redis.call('UNLINK', key)
    return false
  end
  return value
end

local clock = redis.call('TIME')
local micros = clock[1] * 1000000 + clock[2]
local now = string.format('%.0f', micros)

local stands = get(KEYS[1])
if stands and ARGV[6] ~= '' and string.sub(stands, 1, #ARGV[6]) == ARGV[6] then
  redis.call('UNLINK', KEYS[1])
  stands = false
end

-- Whoever writes is behind this clock by what a reply takes. What is ahead by so many ms was written before the clock
-- was set back: how old it is nobody can say.
local AHEAD = 250

local answer, will_do = '', false
if stands then
  local stage, live, asked, received = string.match(stands, '^(%d) ([01]) (%d+) (%d+) ')
  local has_ended = live == '0' and stage ~= '0'
  if not live then
    -- Nonsense: whoever asks has to see that.
    answer, will_do = stands, true
  elseif has_ended or (tonumber(asked) > tonumber(ARGV[5]) and tonumber(received) <= micros / 1000 + AHEAD) then
    answer = stands
    will_do = live == '0' or micros / 1000 - tonumber(received) < tonumber(ARGV[4])
  end
end
if ARGV[1] == 'look' or (will_do and ARGV[1] ~= 'insist') then
  return {now, answer, 'none'}
end

local holder = get(KEYS[2])
if holder == 'each' then
  return {now, answer, 'each'}
end
if holder and holder ~= ARGV[2] then
  return {now, answer, 'theirs'}
end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return {now, answer, 'ours'}
