-- Draws all histories anew, once for each process of Redis, and records it. One step: no server sees half of it.
-- KEYS: 1 meta (hash), then the history of each bucket
-- ARGV: 1 run id of this process, 2 '1' if it is strict, 3 id of what the store holds from now on, then a number for each
-- Returns the id that holds.
if redis.call('HGET', KEYS[1], 'drawn') == ARGV[1] then return redis.call('HGET', KEYS[1], 'id') end
for i = 2, #KEYS do redis.call('SET', KEYS[i], ARGV[i + 2]) end
redis.call('HSET', KEYS[1], 'run', ARGV[1], 'drawn', ARGV[1], 'strict', ARGV[2], 'id', ARGV[3])
return ARGV[3]
