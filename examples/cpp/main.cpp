// train_and_evaluate PACKAGE BATCHES OUT [STEPS]: trains a package of compile_modes with SGD, evaluates it after each step,
// and writes its weights and what it has computed. No Python runs here, and nothing is compiled.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>

using Tensors = std::unordered_map<std::string, at::Tensor>;
using Loader = torch::inductor::AOTIModelPackageLoader;
using Words = std::vector<std::string>;

static Words split(const std::string& text, char by) {
  Words found;
  std::stringstream stream(text);
  for (std::string word; std::getline(stream, word, by);) found.push_back(word);
  return found;
}

static std::vector<int64_t> numbers(const std::string& text) {
  std::vector<int64_t> found;
  for (const auto& word : split(text, ',')) found.push_back(std::stoll(word));
  return found;
}

// What a package says of itself, in lines of words between tabs; and its weights, each storage once.
struct Package {
  caffe2::serialize::PyTorchStreamReader reader;
  std::vector<Words> lines;
  std::map<std::string, at::Tensor> storages;  // by record

  explicit Package(const std::string& path) : reader(path) {
    auto [data, size] = reader.getRecord("extra/compile_modes.txt");
    for (const auto& line : split({static_cast<char*>(data.get()), size}, '\n')) lines.push_back(split(line, '\t'));
  }

  // A tensor from the words that say where it lies: record, dtype, sizes, strides, offset.
  at::Tensor tensor(const Words& words, size_t at) {
    static const std::map<std::string, at::ScalarType> types{
        {"float32", at::kFloat}, {"float64", at::kDouble}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
        {"int64", at::kLong},    {"int32", at::kInt},      {"uint8", at::kByte},   {"bool", at::kBool}};
    if (!storages.count(words.at(at))) {
      auto size = static_cast<int64_t>(reader.getRecordSize(words.at(at)));
      storages[words.at(at)] = at::empty({size}, at::kByte);
      reader.getRecord(words.at(at), storages[words.at(at)].data_ptr(), size);
    }
    auto type = types.at(words.at(at + 1));
    return at::empty({0}, type).set_(storages.at(words.at(at)).storage(), std::stoll(words.at(at + 4)),
                                     numbers(words.at(at + 2)), numbers(words.at(at + 3)));
  }

  Tensors weights() {
    Tensors found;
    for (const auto& words : lines)
      if (words.at(0) == "weight") found[words.at(1)] = tensor(words, 2);
    return found;
  }

  // Lets a mode read and write these very weights. A loader checks nothing of them; these are as it was compiled for.
  void share(Loader& loader, const std::string& mode, const Tensors& weights) {
    Tensors given, constants;
    for (const auto& words : lines)
      if (words.at(0) == "constant" && words.at(1) == mode) constants[words.at(2)] = tensor(words, 3);
    for (const auto& name : loader.get_constant_fqns())
      given[name] = weights.count(name) ? weights.at(name) : constants.at(name);
    loader.load_constants(given, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }

  // The parameters that the last results of a mode are gradients of, by the place among its results.
  std::map<size_t, std::string> gradients(const std::string& mode) {
    std::map<size_t, std::string> found;
    size_t place = 0;
    for (const auto& words : lines) {
      if (words.at(0) != "output" || words.at(1) != mode) continue;
      if (words.at(2) == "gradient") found[place] = words.at(3);
      ++place;
    }
    return found;
  }
};

static c10::IValue read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot open ", path);
  return torch::jit::pickle_load({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
}

// A tuple of pairs, which Python reads by dict(torch.load(path, weights_only=True)); a dict of C++'s it refuses.
static void write(const Tensors& tensors, const std::string& path) {
  std::vector<c10::IValue> pairs;
  for (const auto& [name, tensor] : tensors) pairs.push_back(c10::ivalue::Tuple::create(name, tensor));
  auto bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(pairs)));
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

int main(int argc, char** argv) {
  TORCH_CHECK(argc >= 4, "usage: train_and_evaluate PACKAGE BATCHES OUT [STEPS]");
  at::NoGradGuard no_grad;
  Package package(argv[1]);
  Tensors weights = package.weights();
  Loader train(argv[1], "train"), eval(argv[1], "eval");
  package.share(train, "train", weights);
  package.share(eval, "eval", weights);

  auto batches = read(argv[2]).toTupleRef().elements().vec();  // (inputs, targets), each of all steps
  at::Tensor inputs = batches.at(0).toTensor(), targets = batches.at(1).toTensor();
  auto steps = argc > 4 ? std::stoll(argv[4]) : inputs.size(0);
  auto gradients = package.gradients("train");
  std::vector<at::Tensor> losses, evaluated;
  for (int64_t step = 0; step < steps; ++step) {
    auto results = train.run({inputs[step], targets[step]});  // also writes running statistics
    for (const auto& [place, name] : gradients) weights.at(name).sub_(results.at(place), /*alpha=*/0.1);
    losses.push_back(results.at(0));
    evaluated.push_back(eval.run({inputs[step]}).at(0));
    std::cout << "step " << step << ", loss " << losses.back().item<float>() << "\n";
  }
  weights["losses"] = at::stack(losses);
  weights["evaluated"] = at::stack(evaluated);
  write(weights, argv[3]);
}
