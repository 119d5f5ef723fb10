-- The last step from layout 1 to 2: the number, and a record of who served the store, which begins here.
-- KEYS: 1 meta (hash)   ARGV: 1 run id of this process, 2 '1' if it is strict, 3 id of what the store holds
if redis.call('HGET', KEYS[1], 'layout') ~= '1' then return 0 end
redis.call('HSET', KEYS[1], 'layout', '2', 'run', ARGV[1], 'strict', ARGV[2], 'id', ARGV[3])
return 1
