// Calls of the CPU library's C interface, replayed from a file: what every stage is given, and what it must return.
//
//     replay FILE
//
// tests/helpers/replay.py writes the file. A difference is told with stage, case and field, and the exit code is 1; it
// is 2 where the file is not understood. Neither torch nor Python is needed: this runs where an emulator runs.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

struct Row {  // of layout.cpp
    const char* name;
    int64_t offset, size;
};

struct Stage {
    const char* name;
    int (*run[2])(const void*, int);  // float32, float64
    const Row* (*layout)();
};

#define STAGES(DO)                                                                                         \
    DO(neighbors, Neighbors) DO(competition, Competition) DO(inverse_norm, InverseNorm) DO(rank, Rank)     \
    DO(selection, Selection) DO(targets, Targets) DO(gradient, Gradient)
#define DECLARE(name, Struct)                                      \
    extern "C" int bcl_cpu_##name##_f32(const void*, int threads); \
    extern "C" int bcl_cpu_##name##_f64(const void*, int threads); \
    extern "C" const Row* bcl_cpu_layout_##Struct();
#define ENTRY(name, Struct) {#name, {bcl_cpu_##name##_f32, bcl_cpu_##name##_f64}, bcl_cpu_layout_##Struct},
STAGES(DECLARE)
static const Stage stages[] = {STAGES(ENTRY)};
extern "C" const char* bcl_cpu_isa();

[[noreturn]] static void refuse(const std::string& what) {
    fprintf(stderr, "not understood: %s\n", what.c_str());
    exit(2);
}

// --- The file ---------------------------------------------------------------------------------------------------------

static FILE* file;

static void read(void* target, size_t bytes) {
    if (bytes && fread(target, 1, bytes, file) != bytes) refuse("the file ends early");
}

template <class T>
static T read() {
    T value;
    read(&value, sizeof value);
    return value;
}

static std::string read_text() {
    std::string text(read<uint64_t>(), ' ');
    read(&text[0], text.size());
    return text;
}

struct Array {
    char element;  // q: int64, f: float32, d: float64
    size_t count = 0;
    std::vector<char> bytes;

    size_t size() const { return element == 'f' ? 4 : 8; }
    double number(size_t i) const {
        if (element == 'q') return double(((const int64_t*)bytes.data())[i]);
        return element == 'f' ? ((const float*)bytes.data())[i] : ((const double*)bytes.data())[i];
    }
};

static Array read_array() {
    Array array;
    array.element = read<char>();
    array.count = read<uint64_t>();
    array.bytes.resize(array.count * array.size());
    read(array.bytes.data(), array.bytes.size());
    return array;
}

constexpr size_t MARGIN = 64;  // bytes around what a stage writes, which it leaves as they are

struct Field {
    std::string name;
    char kind;  // i, d: a number; 0: null; a: an array it reads; o: one it writes; u: the same, not looked at
    int64_t integer = 0;
    double number = 0, budget = 0;  // budget: negative for equal, else of max |value - right| / max |right|
    Array before, right;            // before: empty where what it writes holds nothing yet
    std::vector<char> written;      // with margins

    bool output() const { return kind == 'o' || kind == 'u'; }
};

static Field read_field() {
    Field field;
    field.name = read_text();
    field.kind = read<char>();
    if (field.kind == 'i') field.integer = read<int64_t>();
    else if (field.kind == 'd') field.number = read<double>();
    else if (field.kind == 'a') field.before = read_array();
    else if (field.output()) {
        field.budget = read<double>();
        field.before = read_array();
        field.right = read_array();
    } else if (field.kind != '0') refuse("a field of kind " + std::string(1, field.kind));
    return field;
}

struct Case {
    std::string stage, label;
    int wide;  // 0: float32, 1: float64
    std::vector<Field> fields;
};

// --- A call -----------------------------------------------------------------------------------------------------------

static std::string place(const Case& c) { return c.stage + (c.wide ? "_f64, " : "_f32, ") + c.label; }

// The field of the struct, as wide as what goes there.
static const Row& row_of(const Row* row, const Case& c, const Field& field) {
    for (; row->name; row++)  // an integer may be of 4 bytes
        if (field.name == row->name && (field.kind == 'i' || row->size == 8)) return *row;
    refuse(place(c) + ": no field " + field.name);
}

static int call(const Stage& stage, Case& c, int threads) {
    const Row* row = stage.layout();
    size_t rows = 0;
    while (row[rows].name) rows++;
    if (rows != c.fields.size()) refuse(place(c) + ": not all fields, or too many");
    std::vector<char> arguments(row[rows].offset);
    for (Field& field : c.fields) {
        const Row& own = row_of(row, c, field);
        const void* pointer = field.kind == 'a' ? field.before.bytes.data() : nullptr;
        if (field.output()) {
            const size_t given = field.before.bytes.size(), bytes = field.right.bytes.size();
            if (given && given != bytes) refuse(place(c) + ": two sizes of " + field.name);
            field.written.assign(bytes + 2 * MARGIN, char(0xFF));  // NaN, and no index
            if (given) memcpy(field.written.data() + MARGIN, field.before.bytes.data(), given);
            pointer = field.written.data() + MARGIN;
        }
        const void* value = field.kind == 'i' ? (const void*)&field.integer : &pointer;
        if (field.kind == 'd') value = &field.number;
        memcpy(arguments.data() + own.offset, value, own.size);  // of an integer the low bytes, which come first
    }
    return stage.run[c.wide](arguments.data(), threads);
}

// --- What it returned -------------------------------------------------------------------------------------------------

static int differences = 0;

static void tell(const Case& c, const std::string& what) {
    printf("%s: %s\n", place(c).c_str(), what.c_str());
    differences++;
}

static Array result_of(const Field& field) {
    Array result = field.right;
    memcpy(result.bytes.data(), field.written.data() + MARGIN, result.bytes.size());
    return result;
}

// A selection's samples in rising order, each with its share: in which order they are listed is open.
static void by_sample(std::vector<Field*> both, int64_t r) {
    if (r < 1) return;
    const Array rows = result_of(*both[0]);
    for (Field* field : both) {
        const Array listed = result_of(*field);
        const size_t size = listed.size();
        for (size_t first = 0; first < rows.count; first += r) {
            std::vector<size_t> order(r);
            std::iota(order.begin(), order.end(), first);
            const int64_t* sample = (const int64_t*)rows.bytes.data();
            for (int64_t i = 1; i < r; i++)  // a stable sort by insertion
                for (int64_t at = i; at > 0 && sample[order[at]] < sample[order[at - 1]]; at--)
                    std::swap(order[at], order[at - 1]);
            for (int64_t i = 0; i < r; i++)
                memcpy(field->written.data() + MARGIN + (first + i) * size, listed.bytes.data() + order[i] * size, size);
        }
    }
}

static void check(const Case& c, const Field& field) {
    for (size_t i = 0; i < MARGIN; i++)
        if (field.written[i] != char(0xFF) || field.written[field.written.size() - 1 - i] != char(0xFF))
            return tell(c, field.name + " is written beyond its ends");
    if (field.kind == 'u') return;
    const Array result = result_of(field);
    size_t wrong = 0, first = 0;
    double error = 0, scale = 0;
    for (size_t i = 0; i < result.count; i++) {
        const double value = result.number(i), right = field.right.number(i);
        if (!(value == right || (value != value && right != right)) && wrong++ == 0) first = i;
        const double off = std::fabs(value - right);
        if (error == error && !(off <= error)) error = off;  // NaN stays
        if (std::fabs(right) > scale) scale = std::fabs(right);
    }
    if (scale > 0) error /= scale;
    char text[200];
    if (field.budget < 0 && wrong) {
        snprintf(text, sizeof text, " differs in %zu of %zu elements, the first at %zu: %.17g, not %.17g", wrong,
                 result.count, first, result.number(first), field.right.number(first));
        tell(c, field.name + text);
    } else if (field.budget >= 0 && !(error <= field.budget)) {
        snprintf(text, sizeof text, " is off by %.1e, allowed are %.1e", error, field.budget);
        tell(c, field.name + text);
    }
}

static void replay(Case& c) {
    const Stage* stage = nullptr;
    for (const Stage& one : stages)
        if (c.stage == one.name) stage = &one;
    if (!stage) refuse("no stage " + c.stage);
    std::vector<std::vector<char>> alone;
    for (int threads : {1, 3}) {
        if (const int status = call(*stage, c, threads)) return tell(c, "refused, status " + std::to_string(status));
        if (c.stage == "selection") {
            std::vector<Field*> both(2);
            int64_t r = 0;
            for (Field& field : c.fields) {
                if (field.name == "rows") both[0] = &field;
                if (field.name == "shares") both[1] = &field;
                if (field.name == "r") r = field.integer;
            }
            by_sample(both, r);
        }
        size_t at = 0;
        for (const Field& field : c.fields) {
            if (!field.output()) continue;
            if (threads == 1) {
                check(c, field);
                alone.push_back(field.written);
            } else if (alone[at++] != field.written) {
                tell(c, field.name + " depends on the number of threads");
            }
        }
    }
}

int main(int count, char** words) {
    file = count == 2 ? fopen(words[1], "rb") : nullptr;
    if (!file) refuse(count == 2 ? std::string("no file ") + words[1] : "one file is needed");
    if (read<uint64_t>() != 0x314C504552434200) refuse("the file is of another kind");
    const uint64_t cases = read<uint64_t>();
    for (uint64_t i = 0; i < cases; i++) {
        Case c;
        c.stage = read_text();
        c.label = read_text();
        c.wide = read<char>() == 'd';
        c.fields.resize(read<uint64_t>());
        for (Field& field : c.fields) field = read_field();
        replay(c);
    }
    if (fgetc(file) != EOF) refuse("the file goes on behind its last case");
    printf("%llu cases, %d differences, %s\n", (unsigned long long)cases, differences, bcl_cpu_isa());
    return differences != 0 || cases == 0;
}
