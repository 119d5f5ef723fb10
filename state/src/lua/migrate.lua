-- A chat of layout 1 as layout 2 has it: always in the recency index, and with the time of its oldest message. Doing it
-- again changes nothing.
-- KEYS: 1 chat (hash), 2 messages (stream), 3 recency (zset)   ARGV: 1 chat
local time = redis.call('HGET', KEYS[1], 'time')
if not time then return 0 end
redis.call('ZADD', KEYS[3], 'NX', time, ARGV[1])
local oldest = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
if oldest then redis.call('HSETNX', KEYS[1], 'oldest', oldest[2][4]) end
return 1
