-- Moves a user's delivered cursor forward, never past the head.
-- KEYS: 1 chat (hash)   ARGV: 1 user, 2 seq
local at = redis.call('HMGET', KEYS[1], 'seq', 'd:' .. ARGV[1])
local seq = math.min(tonumber(ARGV[2]), tonumber(at[1]) or 0)
if seq > (tonumber(at[2]) or 0) then redis.call('HSET', KEYS[1], 'd:' .. ARGV[1], string.format('%.0f', seq)) end
return 1
