-- Marks a number as nobody's: a byte in front of its routes, which no login gets past (bind.lua). For good. When it was there last, and
-- what it hides, is forgotten. Whoever was there is told of as gone, now that the number has its name still.
-- KEYS: 1 route bucket (hash)   ARGV: 1 user, 2 events that a stream of who comes and goes keeps (0: there is none)
local row = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if #row % 20 == 0 then
  redis.call('HSET', KEYS[1], ARGV[1], '-' .. row)
  if #row > 0 then tell(ARGV[1], '0', ARGV[2]) end
end
redis.call('HDEL', 'seen:{' .. KEYS[1] .. '}', ARGV[1], 'h' .. ARGV[1])
return 1
