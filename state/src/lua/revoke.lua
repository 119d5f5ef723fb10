-- Tokens of before a time are not taken any more. What is there and reaches further stays.
-- KEYS: 1 the user's revocations (hash: device (4 bytes), or '' for all -> Unix seconds)
-- ARGV: 1 device (4 bytes) or '', 2 before (Unix seconds), 3 seconds for which it is kept
if tonumber(ARGV[2]) > tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0') then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
if redis.call('TTL', KEYS[1]) < tonumber(ARGV[3]) then redis.call('EXPIRE', KEYS[1], ARGV[3]) end
return 1
