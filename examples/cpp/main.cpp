// Runs an encoder that was compiled ahead of time (docs/compile.md), without Python:
//
//   encode ENCODER.pt2 IMAGES.pt FEATURES.pt
//
// IMAGES.pt   a tensor (N, C, H, W) as torch.save writes it, of the dtype that was exported, N as large as you like
// FEATURES.pt where the features (N, 1+L, D) go, for torch.load
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  if (bytes.empty()) throw std::runtime_error(path + " cannot be read, or is empty");
  return bytes;
}

void write(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error(path + " cannot be written");
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: encode ENCODER.pt2 IMAGES.pt FEATURES.pt\n";
    return 2;
  }
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader encoder(argv[1]);
  const at::Tensor images = torch::jit::pickle_load(read(argv[2])).toTensor();
  const at::Tensor features = encoder.run({images}).at(0);
  write(argv[3], torch::jit::pickle_save(features));
  std::cout << images.sizes() << " -> " << features.sizes() << "\n";
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
