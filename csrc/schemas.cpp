// The schema of every op. The lines are in maefast/schemas.inc: Python reads the same file where
// there is no native build.
#include "stable.h"

STABLE_TORCH_LIBRARY(maefast, m) {
  for (const char* schema : {
#include "../maefast/schemas.inc"
       }) {
    m.def(schema);
  }
}
