// Check of a jagged history: the items at its places, and the places of each row.
#pragma once

#include "tensors.h"

namespace recsys {

// Requires offsets [rows + 1] that rise from 0 to the number of places, and an index [places] into
// the items.
inline void require_history(const Operator& op, const int64_t* index, int64_t places,
                            int64_t items, const int64_t* offsets, int64_t rows) {
  bool rises = offsets[0] == 0 && offsets[rows] == places;
  for (int64_t row = 0; row < rows; ++row) rises &= offsets[row] <= offsets[row + 1];
  op.require(rises, "offsets is out of range: they must rise from 0 to ", places,
             ", the length of index");
  bool is_inside = true;
  for (int64_t n = 0; n < places; ++n) is_inside &= 0 <= index[n] && index[n] < items;
  if (is_inside) return;
  int64_t n = 0;
  while (0 <= index[n] && index[n] < items) ++n;
  op.fail("index is out of range: index[", n, "] is ", index[n], ", but must be in [0, ", items,
          "), the rows of items");
}

}  // namespace recsys
