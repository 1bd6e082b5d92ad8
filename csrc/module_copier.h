// The part of everstep._native that copies in the background.
#pragma once

#include <nanobind/nanobind.h>

namespace everstep {

void add_copier(nanobind::module_& module);

}  // namespace everstep
