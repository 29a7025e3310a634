// The stand-in for libnvrtc.so: finds the names of the kernels in a source, and what is plainly wrong with it.
//
// It compiles nothing. An image names the kernels that the source has, be they written out or made by a macro, and libcuda.so
// has them compiled in.
#include "standin.h"

#include <cstring>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

namespace {

enum nvrtcResult : unsigned {
  NVRTC_SUCCESS = 0,
  NVRTC_ERROR_INVALID_INPUT = 3,
  NVRTC_ERROR_INVALID_PROGRAM = 4,
  NVRTC_ERROR_INVALID_OPTION = 5,
  NVRTC_ERROR_COMPILATION = 6,
};

struct Program {
  std::string name;
  std::string source;
  std::map<std::string, std::string> headers;
  std::string log;
  std::string image;
  bool compiled = false;
};

using nvrtcProgram = Program*;

// All lines with what they include, without comments, and with lines joined that a backslash continues.
class Reader {
 public:
  explicit Reader(Program& program) : program_(program) {}

  bool read(const std::string& name, const std::string& text) {
    static const std::regex INCLUDE("\\s*#\\s*include\\s*[\"<]([^\">]+)[\">].*"), ERROR("\\s*#\\s*error\\b.*");
    size_t number = 0;
    for (const std::string& line : lines(text)) {
      ++number;
      std::smatch match;
      if (std::regex_match(line, ERROR)) return report(name, number, line);
      if (!std::regex_match(line, match, INCLUDE)) {
        lines_.push_back(line);
        continue;
      }
      const std::string included = match[1];
      const auto header = program_.headers.find(included);
      if (header == program_.headers.end()) return report(name, number, "could not open source file \"" + included + "\"");
      if (included_.insert(included).second && !read(included, header->second)) return false;
    }
    return true;
  }

  const std::vector<std::string>& lines() const { return lines_; }

 private:
  static std::vector<std::string> lines(const std::string& text) {
    std::vector<std::string> lines(1);
    for (size_t i = 0; i < text.size(); ++i) {
      if (text.compare(i, 2, "\\\n") == 0) {
        ++i;
      } else if (text.compare(i, 2, "//") == 0) {
        i = std::min(text.find('\n', i), text.size()) - 1;
      } else if (text.compare(i, 2, "/*") == 0) {
        i = std::min(text.find("*/", i), text.size() - 2) + 1;
      } else if (text[i] == '\n') {
        lines.emplace_back();
      } else {
        lines.back() += text[i];
      }
    }
    return lines;
  }

  bool report(const std::string& name, size_t line, const std::string& what) {
    program_.log += name + "(" + std::to_string(line) + "): error: " + what + "\n\n1 error detected in the compilation of \"" +
                    program_.name + "\".\n";
    return false;
  }

  Program& program_;
  std::set<std::string> included_;
  std::vector<std::string> lines_;
};

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  static const std::regex PART("[^,\\s]+");
  for (std::sregex_iterator i(list.begin(), list.end(), PART), end; i != end; ++i) parts.push_back(i->str());
  return parts;
}

void find_kernels(const std::string& text, std::set<std::string>& names) {
  static const std::regex KERNEL(
      "extern\\s+\"C\"\\s+__global__\\s+void\\s+(?:__launch_bounds__\\s*\\([^()]*\\)\\s*)?(\\w+)\\s*\\(");
  for (std::sregex_iterator i(text.begin(), text.end(), KERNEL), end; i != end; ++i) names.insert((*i)[1]);
}

// The text of a macro with arguments in place of its parameters.
std::string expand(std::string body, const std::vector<std::string>& parameters, const std::vector<std::string>& arguments) {
  for (size_t i = 0; i < std::min(parameters.size(), arguments.size()); ++i) {
    body = std::regex_replace(body, std::regex("\\s*##\\s*" + parameters[i] + "\\b|\\b" + parameters[i] + "\\b\\s*##\\s*"),
                              arguments[i]);
    body = std::regex_replace(body, std::regex("\\b" + parameters[i] + "\\b"), arguments[i]);
  }
  return body;
}

std::set<std::string> kernels_of(const std::vector<std::string>& lines) {
  static const std::regex DEFINE("\\s*#\\s*define\\s+(\\w+)\\(([^)]*)\\)(.*)"), USE("\\s*(\\w+)\\s*\\(([^()]*)\\)\\s*;?\\s*");
  struct Macro {
    std::vector<std::string> parameters;
    std::string body;
  };
  std::map<std::string, Macro> macros;
  std::set<std::string> names;
  std::string text;
  for (const std::string& line : lines) {
    std::smatch match;
    if (std::regex_match(line, match, DEFINE)) {
      macros[match[1]] = {split(match[2]), match[3]};
    } else if (std::regex_match(line, match, USE) && macros.contains(match[1])) {
      const Macro& macro = macros[match[1]];
      find_kernels(expand(macro.body, macro.parameters, split(match[2])), names);
    } else {
      text += line + "\n";
    }
  }
  find_kernels(text, names);
  return names;
}

}  // namespace

STANDIN_API nvrtcResult nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return NVRTC_SUCCESS;
}

constexpr int ARCHS[] = {80, 86, 89, 90, 100};

STANDIN_API nvrtcResult nvrtcGetNumSupportedArchs(int* count) {
  *count = sizeof ARCHS / sizeof *ARCHS;
  return NVRTC_SUCCESS;
}

STANDIN_API nvrtcResult nvrtcGetSupportedArchs(int* archs) {
  for (const int arch : ARCHS) *archs++ = arch;
  return NVRTC_SUCCESS;
}

STANDIN_API const char* nvrtcGetErrorString(nvrtcResult result) {
  switch (result) {
    case NVRTC_SUCCESS:
      return "NVRTC_SUCCESS";
    case NVRTC_ERROR_INVALID_INPUT:
      return "NVRTC_ERROR_INVALID_INPUT";
    case NVRTC_ERROR_INVALID_PROGRAM:
      return "NVRTC_ERROR_INVALID_PROGRAM";
    case NVRTC_ERROR_INVALID_OPTION:
      return "NVRTC_ERROR_INVALID_OPTION";
    case NVRTC_ERROR_COMPILATION:
      return "NVRTC_ERROR_COMPILATION";
  }
  return "NVRTC_ERROR unknown";
}

STANDIN_API nvrtcResult nvrtcCreateProgram(nvrtcProgram* out, const char* source, const char* name, int num_headers,
                                           const char* const* headers, const char* const* include_names) {
  if (out == nullptr || source == nullptr || num_headers < 0) return NVRTC_ERROR_INVALID_INPUT;
  auto* const program = new Program;
  program->source = source;
  program->name = name == nullptr ? "default_program" : name;
  for (int i = 0; i < num_headers; ++i) program->headers[include_names[i]] = headers[i];
  *out = program;
  return NVRTC_SUCCESS;
}

STANDIN_API nvrtcResult nvrtcDestroyProgram(nvrtcProgram* program) {
  if (program == nullptr || *program == nullptr) return NVRTC_ERROR_INVALID_PROGRAM;
  delete *program;
  return NVRTC_SUCCESS;
}

STANDIN_API nvrtcResult nvrtcCompileProgram(nvrtcProgram program, int num_options, const char* const* options) {
  if (program == nullptr) return NVRTC_ERROR_INVALID_PROGRAM;
  // Only for a real architecture is there a binary.
  bool is_real = false;
  for (int i = 0; i < num_options; ++i) {
    const std::string option = options[i];
    if (!option.starts_with("-")) {
      program->log = "nvrtc: error: unrecognized option " + option + " found\n";
      return NVRTC_ERROR_INVALID_OPTION;
    }
    is_real = is_real || option.find("=sm_") != std::string::npos;
  }
  Reader reader(*program);
  if (!reader.read(program->name, program->source)) return NVRTC_ERROR_COMPILATION;
  program->compiled = true;
  if (!is_real) return NVRTC_SUCCESS;
  program->image = STANDIN_IMAGE;
  for (const std::string& name : kernels_of(reader.lines())) program->image.append(name.c_str(), name.size() + 1);
  program->image += '\0';
  return NVRTC_SUCCESS;
}

STANDIN_API nvrtcResult nvrtcGetCUBINSize(nvrtcProgram program, size_t* bytes) {
  if (program == nullptr || !program->compiled) return NVRTC_ERROR_INVALID_PROGRAM;
  *bytes = program->image.size();
  return NVRTC_SUCCESS;
}

STANDIN_API nvrtcResult nvrtcGetCUBIN(nvrtcProgram program, char* out) {
  if (program == nullptr || !program->compiled || program->image.empty()) return NVRTC_ERROR_INVALID_PROGRAM;
  std::memcpy(out, program->image.data(), program->image.size());
  return NVRTC_SUCCESS;
}

// With the zero at its end.
STANDIN_API nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram program, size_t* bytes) {
  if (program == nullptr) return NVRTC_ERROR_INVALID_PROGRAM;
  *bytes = program->log.size() + 1;
  return NVRTC_SUCCESS;
}

STANDIN_API nvrtcResult nvrtcGetProgramLog(nvrtcProgram program, char* out) {
  if (program == nullptr) return NVRTC_ERROR_INVALID_PROGRAM;
  std::memcpy(out, program->log.c_str(), program->log.size() + 1);
  return NVRTC_SUCCESS;
}
