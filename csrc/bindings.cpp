// muka_fast._C: the list of everything the extension offers to Python. Pointers travel as integers, so that one build fits
// every torch version; the Python side (kernels/ops) checks dtype, device and contiguity, because raw pointers check nothing.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace muka_fast {
void bind_dropout_add_layer_norm(py::module_& m);
void bind_one_query_attention(py::module_& m);
void bind_mc_head(py::module_& m);
void bind_repeat_dropout(py::module_& m);
void bind_mc_statistics(py::module_& m);
void bind_distill_loss(py::module_& m);
}  // namespace muka_fast

PYBIND11_MODULE(_C, m) {
    m.doc() = "Torch-free kernels of muka_fast; called through muka_fast.ops";
    m.attr("ABI") = 1;
    muka_fast::bind_dropout_add_layer_norm(m);
    muka_fast::bind_one_query_attention(m);
    muka_fast::bind_mc_head(m);
    muka_fast::bind_repeat_dropout(m);
    muka_fast::bind_mc_statistics(m);
    muka_fast::bind_distill_loss(m);
}
