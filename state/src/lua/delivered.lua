-- Moves users' cursors forward, delivered and read, never past the head. Every operation is a step of its own: one that fails
-- answers for itself.
-- KEYS: of each operation its chat (hash)   ARGV: of each operation user, delivered, read (0: nothing was said of that)
-- Returns of each operation where delivered stands now if it moved, else 0; if read was told, {that, where read stands now, 1 if one
-- of them moved}; or an error.
local call = redis.pcall

local function write(seq)
  return string.format('%.0f', seq)
end

local function move(key, user, seq, read)
  if read == 0 then
    local at = call('HMGET', key, 'seq', 'd:' .. user)
    if at.err then return at end
    seq = math.min(seq, tonumber(at[1]) or 0)
    if seq <= (tonumber(at[2]) or 0) then return 0 end
    local done = call('HSET', key, 'd:' .. user, write(seq))
    return type(done) == 'table' and done or seq
  end
  local at = call('HMGET', key, 'seq', 'd:' .. user, 'r:' .. user)
  if at.err then return at end
  local head, delivered, known = tonumber(at[1]) or 0, tonumber(at[2]) or 0, tonumber(at[3]) or 0
  seq, read = math.min(seq, head), math.min(read, head)
  local is_news = seq > delivered or read > known
  if is_news then
    local done =
      call('HSET', key, 'd:' .. user, write(math.max(seq, delivered)), 'r:' .. user, write(math.max(read, known)))
    if type(done) == 'table' then return done end
  end
  return {seq > delivered and seq or 0, math.max(read, known), is_news and 1 or 0}
end

local answers = {}
for i, key in ipairs(KEYS) do
  local at = 3 * i
  answers[i] = move(key, ARGV[at - 2], tonumber(ARGV[at - 1]), tonumber(ARGV[at]))
end
return answers
