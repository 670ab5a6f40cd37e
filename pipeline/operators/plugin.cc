/* DALI operators for the CPU: JPEG bytes, or the label of stored pixels -> network input, in DALI's threads.

   The arithmetic is in decode.c and finish.c, which are compiled as C and linked in. */

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dali/pipeline/operator/arg_helper.h"
#include "dali/pipeline/operator/checkpointing/stateless_operator.h"
#include "dali/pipeline/operator/error_reporting.h"
#include "dali/pipeline/operator/operator.h"

#include "crop.h"

namespace alexnet {

using namespace dali;  // NOLINT

constexpr int kMaxOffset = STORED_SIDE - SIDE;
constexpr size_t kCropValues = 3 * SIDE * SIDE, kStoredBytes = 3 * STORED_SIDE * STORED_SIDE;
constexpr size_t kTarBlock = 512, kHugePage = 2 << 20, kKept = 2;
static_assert(kCropValues % 16 == 0, "the stores past the caches need samples that begin at multiples of 16");

/* Memory for batches, used again once nobody holds it: fresh pages would cost more than the arithmetic. */
class Buffers : public std::enable_shared_from_this<Buffers> {
 public:
  ~Buffers() {
    for (auto &block : free_) munmap(block.first, block.second);
  }

  std::shared_ptr<void> Take(size_t wanted) {
    size_t bytes = (wanted + kHugePage - 1) / kHugePage * kHugePage;
    void *memory = Reuse(&bytes);
    if (!memory) {
      memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      madvise(memory, bytes, MADV_HUGEPAGE);
    }
    return {memory, [pool = weak_from_this(), bytes](void *returned) {
              if (auto alive = pool.lock()) alive->Return(returned, bytes);
              else munmap(returned, bytes);
            }};
  }

 private:
  void *Reuse(size_t *bytes) {
    std::lock_guard<std::mutex> guard(lock_);
    while (!free_.empty()) {
      auto [memory, size] = free_.back();
      free_.pop_back();
      if (size >= *bytes) {
        *bytes = size;
        return memory;
      }
      munmap(memory, size);
    }
    return nullptr;
  }

  void Return(void *memory, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock_);
    if (free_.size() < kKept) free_.emplace_back(memory, bytes);
    else munmap(memory, bytes);
  }

  std::mutex lock_;
  std::vector<std::pair<void *, size_t>> free_;
};

/* Tars, held open, and where in them the pixels of a sample lie: right before its label. */
class Tars {
 public:
  Tars() = default;
  ~Tars() {
    for (auto &tar : files_) close(tar.second);
  }
  Tars(const Tars &) = delete;
  Tars &operator=(const Tars &) = delete;

  /* `source`: of the label, "folder/train-000000.tar:197632:000000042.cls". Returns why not, or "". */
  std::string Find(const std::string &source, int *file, int64_t *start) {
    const size_t name = source.rfind(':'), offset = name == 0 ? name : source.rfind(':', name - 1);
    if (name == std::string::npos || offset == std::string::npos || offset == 0) return "it has no place in a tar";
    *start = std::strtoll(source.c_str() + offset + 1, nullptr, 10) - int64_t{kTarBlock} - int64_t{kStoredBytes};
    const int opened = Open(source.substr(0, offset));
    if (opened < 0) return make_string("the file cannot be opened: ", std::strerror(-opened));
    *file = opened;
    return *start < int64_t{kTarBlock} ? "no pixels before its label" : Check(opened, *start, source.substr(name + 1));
  }

 private:
  /* The number of an open file, or minus that of an error. */
  int Open(const std::string &path) {
    std::lock_guard<std::mutex> guard(lock_);
    auto found = files_.find(path);
    if (found != files_.end()) return found->second;
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) return -errno;
    files_.emplace(path, file);
    return file;
  }

  /* The header before the pixels: "000000042.rgb", 196,608 bytes. */
  static std::string Check(int file, int64_t start, const std::string &label) {
    char header[kTarBlock + 1] = {}, message[MESSAGE_BYTES];
    if (read_bytes(file, start - int64_t{kTarBlock}, kTarBlock, header, message)) return message;
    const std::string name = label.substr(0, label.rfind('.')) + ".rgb";
    const bool is_right = std::strncmp(header, name.c_str(), 100) == 0 &&
                          std::strtoul(std::string(header + 124, 12).c_str(), nullptr, 8) == kStoredBytes;
    return is_right ? "" : "no pixels before its label";
  }

  std::mutex lock_;
  std::unordered_map<std::string, int> files_;
};

enum class Source { kJpeg, kTar };

template <Source source>
class CropFinish : public StatelessOperator<CPUBackend> {
 public:
  explicit CropFinish(const OpSpec &spec)
      : StatelessOperator<CPUBackend>(spec),
        y_("crop_pos_y", spec),
        x_("crop_pos_x", spec),
        mirror_("mirror", spec),
        noise_("noise", spec),
        basis_(spec.GetRepeatedArgument<float>("basis")),
        mean_(spec.GetRepeatedArgument<float>("mean")),
        factor_(spec.GetRepeatedArgument<float>("factor")),
        mean_image_(spec.GetRepeatedArgument<float>("mean_image")),
        is_whole_(spec.GetArgument<bool>("whole")),
        type_(is_whole_ ? DALI_UINT8 : spec.GetArgument<DALIDataType>("dtype")),
        layout_(is_whole_ ? TensorLayout("HWC") : spec.GetArgument<TensorLayout>("output_layout")) {
    DALI_ENFORCE(basis_.empty() || basis_.size() == 9, "basis: expected 9 numbers, or none");
    DALI_ENFORCE(mean_.size() == 3 && factor_.size() == 3, "mean, factor: expected 3 numbers each");
    DALI_ENFORCE(mean_image_.empty() || mean_image_.size() == kCropValues, "mean_image: expected 3 * 224 * 224");
    DALI_ENFORCE(type_ == DALI_FLOAT || type_ == DALI_UINT8, "dtype: expected FLOAT or UINT8");
    DALI_ENFORCE(layout_ == "CHW" || layout_ == "HWC", "output_layout: expected CHW or HWC");
  }

 protected:
  bool SetupImpl(std::vector<OutputDesc> &descriptions, const Workspace &ws) override {
    const int num = ws.GetInputBatchSize(0);
    DALI_ENFORCE(ws.Input<CPUBackend>(0).type() == DALI_UINT8, "expected bytes (UINT8)");
    descriptions.resize(1);
    descriptions[0] = {Shape(num), type_};
    y_.Acquire(spec_, ws, num);
    x_.Acquire(spec_, ws, num);
    mirror_.Acquire(spec_, ws, num);
    noise_.Acquire(spec_, ws, num, TensorShape<1>{3});
    return false;  // RunImpl finds the memory
  }

  void RunImpl(Workspace &ws) override {
    const auto &in = ws.Input<CPUBackend>(0);
    auto &out = ws.Output<CPUBackend>(0);
    const int num = in.num_samples();
    const auto shape = Shape(num);
    const size_t bytes = shape.num_elements() * (type_ == DALI_UINT8 ? 1 : sizeof(float));
    if (out.is_pinned() || !num)  // on its way to a GPU: DALI keeps such memory, and copies from it without waiting
      out.Resize(shape, type_);
    else
      out.ShareData(buffers_->Take(bytes), bytes, false, shape, type_, CPU_ONLY_DEVICE_ID);
    out.SetLayout(layout_);
    failed_ = INT_MAX;
    auto &pool = ws.GetThreadPool();
    std::atomic<int> next{0};
    for (int i = 0; i < std::min(pool.NumThreads(), num); i++)
      pool.AddWork([&](int) {
        for (int n; (n = next++) < num;) Make(in, out, n);
      });
    pool.RunAll();
    if (failed_ < num)  // a line of its own: operators/__init__.py looks for it
      throw DaliRuntimeError(make_string("\nalexnet: ", in.GetMeta(failed_).GetSourceInfo(), ": ", reason_, "\n"));
  }

 private:
  TensorListShape<> Shape(int num) const {
    if (is_whole_) return uniform_list_shape(num, TensorShape<>{STORED_SIDE, STORED_SIDE, 3});
    return uniform_list_shape(num, layout_ == "CHW" ? TensorShape<>{3, SIDE, SIDE} : TensorShape<>{SIDE, SIDE, 3});
  }

  void Make(const TensorList<CPUBackend> &in, TensorList<CPUBackend> &out, int n) {
    float bias[3];
    SetBias(noise_[n].data, bias);
    const Crop crop = {Offset(*y_[n].data), Offset(*x_[n].data), *mirror_[n].data != 0, layout_ == "CHW",
                       type_ == DALI_UINT8, bias, mean_image_.empty() ? nullptr : mean_image_.data(), factor_.data()};
    const Crop *wanted = is_whole_ ? nullptr : &crop;
    void *to = out.raw_mutable_tensor(n);
    DALI_ENFORCE(reinterpret_cast<uintptr_t>(to) % 16 == 0, "the output is not aligned to 16 bytes");
    char message[MESSAGE_BYTES] = "";
    std::string reason;
    if constexpr (source == Source::kJpeg) {
      const auto *data = static_cast<const uint8_t *>(in.raw_tensor(n));
      if (decode_image(data, volume(in.tensor_shape_span(n)), wanted, to, message)) reason = message;
    } else {
      int file = -1;
      int64_t start = 0;
      reason = tars_.Find(in.GetMeta(n).GetSourceInfo(), &file, &start);
      if (reason.empty() && read_image(file, start, wanted, to, message)) reason = message;
    }
    if (!reason.empty()) Refuse(n, reason);
  }

  static int Offset(float position) {
    DALI_ENFORCE(position >= 0 && position <= 1, make_string("crop position ", position, ", expected 0 to 1"));
    return static_cast<int>(position * kMaxOffset + 0.5f);
  }

  /* basis * noise - mean, in the order in which torch sums. */
  void SetBias(const float *noise, float *bias) const {
    for (int k = 0; k < 3; k++) {
      const float *row = basis_.empty() ? nullptr : basis_.data() + 3 * k;
      const float shift = row ? noise[0] * row[0] + noise[1] * row[1] + noise[2] * row[2] : 0;
      bias[k] = shift - mean_[k];
    }
  }

  /* Of the samples that fail the first one counts, whatever the threads do. */
  void Refuse(int n, const std::string &reason) {
    std::lock_guard<std::mutex> guard(lock_);
    if (n > failed_) return;
    failed_ = n;
    reason_ = reason;
  }

  ArgValue<float> y_, x_;
  ArgValue<int> mirror_;
  ArgValue<float, 1> noise_;
  const std::vector<float> basis_, mean_, factor_, mean_image_;
  const bool is_whole_;
  const DALIDataType type_;
  const TensorLayout layout_;
  const std::shared_ptr<Buffers> buffers_ = std::make_shared<Buffers>();
  Tars tars_;
  std::mutex lock_;
  int failed_ = INT_MAX;
  std::string reason_;
};

/* Of samples named folder/train-000000.tar:512:000000042.jpg the digits of the key. */
class ReadKey : public StatelessOperator<CPUBackend> {
 public:
  explicit ReadKey(const OpSpec &spec) : StatelessOperator<CPUBackend>(spec) {}

 protected:
  bool SetupImpl(std::vector<OutputDesc> &descriptions, const Workspace &ws) override {
    descriptions = {{uniform_list_shape(ws.GetInputBatchSize(0), TensorShape<>{kKeyDigits}), DALI_UINT8}};
    return true;
  }

  void RunImpl(Workspace &ws) override {
    const auto &in = ws.Input<CPUBackend>(0);
    auto &out = ws.Output<CPUBackend>(0);
    for (int n = 0; n < in.num_samples(); n++) {
      const std::string &source = in.GetMeta(n).GetSourceInfo();
      DALI_ENFORCE(source.size() >= kKeyDigits + kEnding, make_string("no key in the source \"", source, "\""));
      std::memcpy(out.raw_mutable_tensor(n), source.data() + source.size() - kKeyDigits - kEnding, kKeyDigits);
    }
  }

 private:
  static constexpr size_t kKeyDigits = 9, kEnding = 4;
};

}  // namespace alexnet

#define ALEXNET_ARGUMENTS                                                                                            \
  NumInput(1)                                                                                                        \
      .NumOutput(1)                                                                                                  \
      .AddOptionalArg("crop_pos_y", "The crop's first row, as a fraction k/32 of the 32 pixels of room.", 0.5f, true) \
      .AddOptionalArg("crop_pos_x", "The crop's first column, likewise.", 0.5f, true)                                \
      .AddOptionalArg("mirror", "Not 0: the crop is mirrored, left and right.", 0, true)                             \
      .AddOptionalArg("noise", "Three standard normal numbers: basis * noise is added to a pixel's channels.",       \
                      std::vector<float>{0, 0, 0}, true)                                                             \
      .AddOptionalArg("basis", "(3, 3), row by row, in grey levels; empty: no lighting.", std::vector<float>{})      \
      .AddOptionalArg("mean", "Subtracted from each channel.", std::vector<float>{0, 0, 0})                          \
      .AddOptionalArg("factor", "What each channel is multiplied by in the end.", std::vector<float>{1, 1, 1})       \
      .AddOptionalArg("mean_image", "3 * 224 * 224 numbers, subtracted; laid out like the output; may be empty.",    \
                      std::vector<float>{})                                                                          \
      .AddOptionalTypeArg("dtype", "FLOAT, or UINT8: the cropped and mirrored pixels, no arithmetic.", DALI_FLOAT)   \
      .AddOptionalArg("output_layout", "CHW or HWC.", TensorLayout("CHW"))                                           \
      .AddOptionalArg("whole", "The whole stored image instead, UINT8 (256, 256, 3), HWC.", false)

namespace dali {

using DecodeCropFinish = ::alexnet::CropFinish<::alexnet::Source::kJpeg>;
using ReadCropFinish = ::alexnet::CropFinish<::alexnet::Source::kTar>;

DALI_SCHEMA(alexnet__DecodeCropFinish)
    .DocStr("JPEGs of 256x256 -> crops of 224x224 as the network sees them: ((pixel + lighting - mean) - mean image) * "
            "factor. A JPEG that is damaged within the crop's rows (with `whole`: anywhere) is an error.")
    .ALEXNET_ARGUMENTS;
DALI_REGISTER_OPERATOR(alexnet__DecodeCropFinish, DecodeCropFinish, CPU);

DALI_SCHEMA(alexnet__ReadCropFinish)
    .DocStr("The labels of raw shards -> the same, of the pixels that lie in the tar before each label. The label's "
            "source info says where; the reader need not copy the pixels.")
    .ALEXNET_ARGUMENTS;
DALI_REGISTER_OPERATOR(alexnet__ReadCropFinish, ReadCropFinish, CPU);

DALI_SCHEMA(alexnet__ReadKey)
    .DocStr("Samples -> the nine digits of their keys, from their source info.")
    .NumInput(1)
    .NumOutput(1);
DALI_REGISTER_OPERATOR(alexnet__ReadKey, ::alexnet::ReadKey, CPU);

}  // namespace dali
