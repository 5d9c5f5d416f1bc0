-- Renews the claims of flights that are under way (src/shared/cache.rs).
--
-- KEYS  the claims
-- ARGV  for how long, in ms; then who has claimed each

for i, key in ipairs(KEYS) do
  if redis.call('GET', key) == ARGV[i + 1] then
    redis.call('PEXPIRE', key, ARGV[1])
  end
end
