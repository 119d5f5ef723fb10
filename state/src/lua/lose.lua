-- Draws a new history if it is still the one that was lost. KEYS: 1 history   ARGV: 1 lost, 2 new
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) end
return 1
