// Messages cut short and broken at every place, each in memory of its own size: a sanitizer sees what is read past it.
#include "infer_message.h"

#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "expect.h"

namespace xlarank {
namespace {

std::string field(int number, const std::string& content) {
  std::string out(1, static_cast<char>(number << 3 | 2));
  size_t size = content.size();
  for (; size >= 0x80; size >>= 7) out.push_back(static_cast<char>(size | 0x80));
  out.push_back(static_cast<char>(size));
  return out + content;
}

std::string described(const std::string& name, const std::string& datatype, const std::string& shape) {
  return field(5, field(1, name) + field(2, datatype) + field(3, shape));
}

std::string usual() {
  return field(1, "feed") + described("age", "FP32", "\x01") + described("ids", "INT64", "\x96\x01") +
         field(3, "an id") + described("v", "FP32", "\x02\x03") + described("s", "BYTES", "\x02") +
         field(7, std::string(4, 'a')) + field(7, std::string(150 * 8, 'i')) + field(7, std::string(24, 'v')) +
         field(7, std::string(10, 's'));
}

InferForms forms() {
  InferForms forms;
  forms.add("age", "FP32", 4, 1, true);
  forms.add("ids", "INT64", 8, 1, false);
  forms.add("v", "FP32", 4, 3, true);
  forms.add("s", "BYTES", 0, 1, false);
  return forms;
}

// Whether a message was located; all that is named lies in it.
bool locate(std::string_view bytes) {
  static const InferForms own = forms();
  const std::unique_ptr<char[]> copy(new char[bytes.size()]);
  if (!bytes.empty()) std::memcpy(copy.get(), bytes.data(), bytes.size());
  const std::string_view data(copy.get(), bytes.size());
  InferMessage message;
  std::vector<WireSpan> spans;
  if (!message.read(data) || !own.locate(data, message, spans)) return false;
  volatile char last = 0;  // so that every byte is read
  for (const WireSpan& span : spans) {
    if (span.offset < 0) continue;
    EXPECT(span.rows >= 0 && span.size >= 0 && span.offset + span.size <= static_cast<int64_t>(data.size()),
           "%lld bytes at %lld of %zu", static_cast<long long>(span.size), static_cast<long long>(span.offset),
           data.size());
    for (int64_t i = 0; i < span.size; ++i) last = data[static_cast<size_t>(span.offset + i)];
  }
  static_cast<void>(last);
  return true;
}

void test_the_usual_message_is_located() {
  const std::string data = usual();
  InferMessage message;
  std::vector<WireSpan> spans;
  EXPECT(message.read(data), "not read");
  EXPECT(message.rest == field(1, "feed") + field(3, "an id"), "rest of %zu bytes", message.rest.size());
  EXPECT(forms().locate(data, message, spans), "not located");
  const std::string letters = "aivs";
  for (size_t i = 0; i < spans.size(); ++i) {
    EXPECT(data[static_cast<size_t>(spans[i].offset)] == letters[i], "input %zu", i);
  }
  EXPECT(spans[1].rows == 150 && spans[1].size == 1200 && spans[2].rows == 2, "sizes");
}

void test_a_message_cut_anywhere_is_read_to_its_end() {
  const std::string data = usual();
  for (size_t size = 0; size < data.size(); ++size) locate(std::string_view(data).substr(0, size));
}

void test_broken_messages_name_nothing_outside() {
  Random random(7);
  const std::string data = usual();
  int num_located = 0;
  for (int round = 0; round < 200000; ++round) {
    std::string broken = data.substr(0, static_cast<size_t>(random.below(20) ? data.size() : random.below(200)));
    // Mostly where the structure is.
    for (int64_t i = 1 + random.below(3); i && !broken.empty(); --i) {
      const int64_t end = static_cast<int64_t>(broken.size());
      broken[static_cast<size_t>(random.below(random.below(4) && end > 120 ? 120 : end))] =
          static_cast<char>(random.below(256));
    }
    num_located += locate(broken);
  }
  EXPECT(num_located > 1000 && num_located < 199000, "%d located", num_located);
}

}  // namespace
}  // namespace xlarank

int main() {
  xlarank::test_the_usual_message_is_located();
  xlarank::test_a_message_cut_anywhere_is_read_to_its_end();
  xlarank::test_broken_messages_name_nothing_outside();
}
