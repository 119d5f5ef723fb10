-- Marks a number as nobody's: a byte in front of its routes, which no login gets past (bind.lua). For good. When it was there last, and
-- what it hides, is forgotten.
-- KEYS: 1 route bucket (hash)   ARGV: 1 user
local row = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if #row % 20 == 0 then redis.call('HSET', KEYS[1], ARGV[1], '-' .. row) end
redis.call('HDEL', 'seen:{' .. KEYS[1] .. '}', ARGV[1], 'h' .. ARGV[1])
return 1
