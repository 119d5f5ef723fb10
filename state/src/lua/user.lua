-- The number of a user, given if new.
-- KEYS: 1 user bucket (hash: name -> number)   ARGV: 1 name, 2 number to give
redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
return redis.call('HGET', KEYS[1], ARGV[1])
