-- A group, all of its rows, and how far everybody has it.
-- KEYS: 1 chat (hash), 2 members (hash)   ARGV: 1 whether cursors are asked for (1: they are)
-- Returns {the group, rows: user and row in turn, cursors: delivered or '' and read or '' of each in the same order}.
local at = redis.call('HMGET', KEYS[1], 'gv', 'gt', 'gn', 'gr', 'gd')
for i = 1, 5 do at[i] = at[i] or '' end
local rows, cursors = redis.call('HGETALL', KEYS[2]), {}
if ARGV[1] == '1' then
  -- `unpack` has room for some thousand values.
  for from = 1, #rows, 1000 do
    local fields = {}
    for i = from, math.min(from + 999, #rows), 2 do
      fields[#fields + 1] = 'd:' .. rows[i]
      fields[#fields + 1] = 'r:' .. rows[i]
    end
    for _, seq in ipairs(redis.call('HMGET', KEYS[1], unpack(fields))) do cursors[#cursors + 1] = seq or '' end
  end
end
return {at, rows, cursors}
