/* Emulates AMX where the processor has none, for tests: load it first (LD_PRELOAD) and tile instructions work.

   An instruction that the processor does not know raises SIGILL; the handler decodes it at the saved instruction
   pointer, does its work on tiles of the thread, and goes on behind it. What Intel's manual makes a fault is one here
   too: bad configurations, tiles that do not fit together, tiles before permission was asked of the kernel. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

enum { TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64 };
enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
enum { PP_NONE, PP_66, PP_F3, PP_F2 };
enum { LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOAD, TILESTORE, DOT_BF16, DOT_INT8, KINDS };
enum { FLUSH_DENORMALS = 0x9FC0 }; /* MXCSR: masked, to nearest, denormals are zero on both sides */

typedef struct { uint8_t byte[MOST_ROWS][MOST_BYTES]; } Tile;
typedef struct { int configured, rows[TILES], bytes[TILES]; uint8_t config[64]; Tile tile[TILES]; } State;
typedef struct { int map, wide, other, long_form, prefix, opcode, mod, reg, rm, base, index, scale; int64_t displacement;
                 int length; } Instruction;

static __thread State state;
static atomic_long counts[KINDS];
static atomic_int permitted;
static struct sigaction before;

long amx_count(int kind) { return atomic_load(&counts[kind]); }

static const int registers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
enum { NONE = -1, AT_RIP = -2 };

static int32_t read32(const uint8_t *at) { int32_t value; memcpy(&value, at, 4); return value; }

/* The three-byte VEX form, with ModRM, SIB and displacement; 0 if it is anything else. */
static int decode(const uint8_t *at, Instruction *found)
{
  if (at[0] != 0xC4) return 0;
  int r = !(at[1] >> 7 & 1), x = !(at[1] >> 6 & 1), b = !(at[1] >> 5 & 1), modrm = at[4];
  *found = (Instruction){.map = at[1] & 31, .wide = at[2] >> 7, .other = ~at[2] >> 3 & 15, .long_form = at[2] >> 2 & 1,
                         .prefix = at[2] & 3, .opcode = at[3], .mod = modrm >> 6, .reg = (modrm >> 3 & 7) | r << 3,
                         .rm = (modrm & 7) | b << 3, .base = NONE, .index = NONE, .length = 5};
  if (found->mod == 3) return 1;
  found->base = found->rm;
  if ((modrm & 7) == 4) {
    int sib = at[found->length++], index = (sib >> 3 & 7) | x << 3;
    found->base = (sib & 7) | b << 3;
    found->index = index == 4 ? NONE : index;
    found->scale = sib >> 6;
    if (found->mod == 0 && (sib & 7) == 5) found->base = NONE;
  } else if (found->mod == 0 && (modrm & 7) == 5) {
    found->base = AT_RIP;
  }
  if (found->mod == 1) found->displacement = (int8_t)at[found->length++];
  if (found->mod == 2 || found->base == AT_RIP || (found->mod == 0 && found->base == NONE)) {
    found->displacement = read32(at + found->length);
    found->length += 4;
  }
  return 1;
}

static int64_t general(const greg_t *saved, int number) { return saved[registers[number]]; }

static uint8_t *address(const Instruction *found, const greg_t *saved)
{
  int64_t at = found->displacement;
  if (found->base == AT_RIP) at += saved[REG_RIP] + found->length;
  else if (found->base != NONE) at += general(saved, found->base);
  return (uint8_t *)at;
}

static int64_t index_value(const Instruction *found, const greg_t *saved)
{
  return found->index == NONE ? 0 : general(saved, found->index) << found->scale;
}

static int is_zero(const uint8_t *at, int count)
{
  for (int i = 0; i < count; ++i) if (at[i]) return 0;
  return 1;
}

static const char *configure(const uint8_t *config)
{
  if (config[0] == 0) { memset(&state, 0, sizeof state); return NULL; }
  if (config[0] != 1) return "no such palette";
  if (config[1] != 0) return "a start row is not emulated";
  if (!is_zero(config + 2, 14) || !is_zero(config + 32, 16) || !is_zero(config + 56, 8)) return "reserved bytes are set";
  State next = {.configured = 1};
  for (int t = 0; t < TILES; ++t) {
    next.bytes[t] = config[16 + 2 * t] | config[17 + 2 * t] << 8;
    next.rows[t] = config[48 + t];
    if (next.bytes[t] > MOST_BYTES || next.rows[t] > MOST_ROWS) return "a tile is too large";
    if (!next.bytes[t] != !next.rows[t]) return "a tile has rows without bytes or bytes without rows";
  }
  memcpy(next.config, config, 64);
  state = next;
  return NULL;
}

static const char *move(const Instruction *found, const greg_t *saved, int to_memory)
{
  int t = found->reg;
  if (t >= TILES || !state.rows[t]) return "a tile that is not configured";
  uint8_t *at = address(found, saved);
  int64_t stride = index_value(found, saved);
  if (!to_memory) memset(&state.tile[t], 0, sizeof(Tile));
  for (int row = 0; row < state.rows[t]; ++row)
    if (to_memory) memcpy(at + row * stride, state.tile[t].byte[row], state.bytes[t]);
    else memcpy(state.tile[t].byte[row], at + row * stride, state.bytes[t]);
  return NULL;
}

static float bf16(const uint8_t *at)
{
  uint32_t bits = (uint32_t)(at[0] | at[1] << 8) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* Sums over even and odd k apart, then together, then onto the tile. A product of two bfloat16 is exact in fp32. */
static void dot_bf16(Tile *sums, const Tile *a, const Tile *b, int rows, int words, int columns)
{
  unsigned int kept = _mm_getcsr();
  _mm_setcsr(FLUSH_DENORMALS);
  for (int m = 0; m < rows; ++m) {
    float even[16] = {0}, odd[16] = {0}, sum[16];
    for (int k = 0; k < words; ++k) {
      float low = bf16(a->byte[m] + 4 * k), high = bf16(a->byte[m] + 4 * k + 2);
      for (int n = 0; n < columns; ++n) {
        even[n] += low * bf16(b->byte[k] + 4 * n);
        odd[n] += high * bf16(b->byte[k] + 4 * n + 2);
      }
    }
    memcpy(sum, sums->byte[m], sizeof sum);
    for (int n = 0; n < columns; ++n) sum[n] += even[n] + odd[n];
    memcpy(sums->byte[m], sum, sizeof sum);
  }
  _mm_setcsr(kept);
}

static int32_t as_signed(uint8_t byte, int is_signed) { return is_signed ? (int8_t)byte : byte; }

/* Four products a word; sums wrap. */
static void dot_int8(Tile *sums, const Tile *a, const Tile *b, int rows, int words, int columns, int prefix)
{
  int a_signed = prefix == PP_F2 || prefix == PP_F3, b_signed = prefix == PP_F2 || prefix == PP_66;
  for (int m = 0; m < rows; ++m) {
    uint32_t sum[16];
    memcpy(sum, sums->byte[m], sizeof sum);
    for (int k = 0; k < 4 * words; ++k) {
      int32_t left = as_signed(a->byte[m][k], a_signed);
      for (int n = 0; n < columns; ++n)
        sum[n] += (uint32_t)(left * as_signed(b->byte[k / 4][4 * n + k % 4], b_signed));
    }
    memcpy(sums->byte[m], sum, sizeof sum);
  }
}

static const char *multiply(const Instruction *found)
{
  int c = found->reg, a = found->rm, b = found->other;
  if (c >= TILES || a >= TILES || b >= TILES || c == a || c == b || a == b) return "three different tiles are needed";
  if (!state.rows[a] || !state.rows[b] || !state.rows[c]) return "a tile that is not configured";
  if (state.bytes[a] % 4 || state.bytes[b] % 4 || state.bytes[c] % 4) return "rows are not whole words";
  if (state.rows[a] != state.rows[c] || state.bytes[b] != state.bytes[c]) return "the sums have another shape";
  if (state.bytes[a] / 4 != state.rows[b]) return "the rows of B are not the words of A";
  int rows = state.rows[c], words = state.bytes[a] / 4, columns = state.bytes[c] / 4;
  if (found->opcode == 0x5C) dot_bf16(&state.tile[c], &state.tile[a], &state.tile[b], rows, words, columns);
  else dot_int8(&state.tile[c], &state.tile[a], &state.tile[b], rows, words, columns, found->prefix);
  return NULL;
}

static int kind_of(const Instruction *found)
{
  int of_memory = found->mod != 3, needs_sib = of_memory && (found->rm & 7) == 4;
  if (found->map != 2 || found->wide || found->long_form) return -1;
  switch (found->opcode) {
  case 0x49:
    if (of_memory && found->reg == 0 && found->prefix == PP_NONE) return LDTILECFG;
    if (of_memory && found->reg == 0 && found->prefix == PP_66) return STTILECFG;
    if (!of_memory && found->prefix == PP_NONE && found->reg == 0 && found->rm == 0) return TILERELEASE;
    return !of_memory && found->prefix == PP_F2 && found->rm == 0 ? TILEZERO : -1;
  case 0x4B:
    if (!needs_sib || found->prefix == PP_NONE) return -1;
    return found->prefix == PP_F3 ? TILESTORE : TILELOAD;
  case 0x5C: return !of_memory && found->prefix == PP_F3 ? DOT_BF16 : -1;
  case 0x5E: return !of_memory ? DOT_INT8 : -1;
  default: return -1;
  }
}

/* NULL when done, else what is wrong with it. */
static const char *execute(int kind, const Instruction *found, const greg_t *saved)
{
  if (!atomic_load(&permitted)) return "permission was not asked";
  if (kind >= TILEZERO && !state.configured) return "tiles are not configured";
  switch (kind) {
  case LDTILECFG: return configure(address(found, saved));
  case STTILECFG: memcpy(address(found, saved), state.config, 64); return NULL;
  case TILERELEASE: memset(&state, 0, sizeof state); return NULL;
  case TILEZERO:
    if (found->reg >= TILES || !state.rows[found->reg]) return "a tile that is not configured";
    memset(&state.tile[found->reg], 0, sizeof(Tile));
    return NULL;
  case TILELOAD: return move(found, saved, 0);
  case TILESTORE: return move(found, saved, 1);
  default: return multiply(found);
  }
}

static void refuse(int number, const char *why)
{
  char text[160];
  int length = snprintf(text, sizeof text, "AMX emulator: %s\n", why);
  if (write(STDERR_FILENO, text, length) < 0) _exit(1);
  signal(number, SIG_DFL);
}

static void on_illegal(int number, siginfo_t *info, void *context)
{
  greg_t *saved = ((ucontext_t *)context)->uc_mcontext.gregs;
  Instruction found;
  int kind = decode((const uint8_t *)saved[REG_RIP], &found) ? kind_of(&found) : -1;
  (void)info;
  const char *why = kind < 0 ? "an instruction that it does not know" : execute(kind, &found, saved);
  if (why != NULL) { refuse(number, why); return; } /* the instruction is met again and ends the process */
  atomic_fetch_add(&counts[kind], 1);
  saved[REG_RIP] += found.length;
}

__attribute__((constructor)) void amx_install(void)
{
  struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGILL, &action, &before);
}

/* Stands in front of libc's: says yes to tile registers, hands everything else on. */
long syscall(long number, ...)
{
  va_list rest;
  va_start(rest, number);
  long a = va_arg(rest, long), b = va_arg(rest, long), c = va_arg(rest, long), d = va_arg(rest, long);
  long e = va_arg(rest, long), f = va_arg(rest, long), result;
  va_end(rest);
  if (number == SYS_arch_prctl && a == ARCH_REQ_XCOMP_PERM && b == XTILEDATA) {
    atomic_store(&permitted, 1);
    return 0;
  }
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  __asm__ volatile("syscall" : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  if (result >= 0 || result < -4095) return result;
  extern int *__errno_location(void);
  *__errno_location() = (int)-result;
  return -1;
}
