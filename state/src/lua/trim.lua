-- Removes messages of a chat below a seq and, if older than `before`, above it. Stands in front of the scripts that use it.
-- first, at: lowest and highest seq that there is. Times rise with seqs, so the boundary is found in halves.
local function trim(chat, messages, first, at, low, before)
  local function entry(seq)
    return redis.call('XRANGE', messages, string.format('%.0f', seq) .. '-0', '+', 'COUNT', 1)[1]
  end
  low = math.max(low, first)
  local to = at + 1
  while before > 0 and low < to do
    local middle = math.floor((low + to) / 2)
    local found = entry(middle)
    if found and (tonumber(found[2][4]) or math.huge) < before then
      low = tonumber(string.match(found[1], '^%d+')) + 1
    else
      to = middle
    end
  end
  local kept = string.format('%.0f', low)
  if low > at then
    redis.call('UNLINK', messages)
  elseif low > first then
    redis.call('XTRIM', messages, 'MINID', kept)
  end
  local oldest = low <= at and entry(low)
  redis.call('HSET', chat, 'first', kept, 'oldest', oldest and oldest[2][4] or '0')
end
