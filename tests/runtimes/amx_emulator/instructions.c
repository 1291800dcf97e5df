/* Tile instructions as an assembler writes them, in the address forms that there are, for the test of the emulator. */
#include <stdint.h>

static const uint8_t fixed[64] = {1, [16] = 64, [18] = 64, [20] = 64, [48] = 16, [49] = 16, [50] = 16};

/* sums += A B, whose tiles have rows x words and words x columns; every row of memory is `stride` bytes long. */
#define PRODUCT(name)                                                                                          \
  void name(const uint8_t *config, const void *a, const void *b, void *sums, int64_t stride)                    \
  {                                                                                                             \
    __asm__ volatile("ldtilecfg (%0)\n\t"                                                                       \
                     "tilezero %%tmm5\n\t"                                                                      \
                     "tileloadd (%1,%4,1), %%tmm1\n\t"                                                          \
                     "tileloaddt1 (%2,%4,1), %%tmm2\n\t"                                                        \
                     "tileloadd (%3,%4,1), %%tmm5\n\t" #name " %%tmm2, %%tmm1, %%tmm5\n\t"                      \
                     "tilestored %%tmm5, (%3,%4,1)\n\t"                                                         \
                     "tilerelease" : : "r"(config), "r"(a), "r"(b), "r"(sums), "r"(stride) : "memory");         \
  }

PRODUCT(tdpbf16ps)
PRODUCT(tdpbssd)
PRODUCT(tdpbsud)
PRODUCT(tdpbusd)
PRODUCT(tdpbuud)

/* Each row of 64 bytes is copied by another form of address; the configuration is found relative to the instruction. */
void copies(const uint8_t *from, uint8_t *to)
{
  __asm__ volatile("ldtilecfg %0\n\t"
                   "mov $64, %%r9\n\t"
                   "tileloadd (%1,%%r9,1), %%tmm0\n\t"
                   "tilestored %%tmm0, (%2,%%r9,1)\n\t"
                   "mov %1, %%r12\n\t"
                   "mov %2, %%r13\n\t"
                   "mov $16, %%r14\n\t"
                   "tileloadd 1024(%%r12,%%r14,4), %%tmm1\n\t"
                   "tilestored %%tmm1, 1024(%%r13,%%r14,4)\n\t"
                   "lea 2000(%1), %%r12\n\t"
                   "lea 2000(%2), %%r13\n\t"
                   "tileloadd 48(%%r12,%%r14,4), %%tmm2\n\t"
                   "tilestored %%tmm2, 48(%%r13,%%r14,4)\n\t"
                   "lea 1024(%1), %%rbp\n\t"
                   "mov $32, %%r8\n\t"
                   "tileloadd (%%rbp,%%r8,2), %%tmm2\n\t"
                   "tilestored %%tmm2, 3072(%2,%%r9,1)\n\t"
                   "tilerelease"
                   : : "m"(fixed), "r"(from), "r"(to)
                   : "memory", "r8", "r9", "r12", "r13", "r14", "rbp");
}

/* Without an index register every row is the same one. */
void repeats(const uint8_t *config, const uint8_t *from, uint8_t *to, int64_t stride)
{
  __asm__ volatile("ldtilecfg (%0)\n\ttileloadd (%1), %%tmm7\n\ttilestored %%tmm7, (%2,%3,1)\n\ttilerelease"
                   : : "r"(config), "r"(from), "r"(to), "r"(stride) : "memory");
}

void stored_config(const uint8_t *config, uint8_t *found)
{
  __asm__ volatile("ldtilecfg (%0)\n\tsttilecfg (%1)\n\ttilerelease\n\tsttilecfg 64(%1)" : : "r"(config), "r"(found)
                   : "memory");
}

void unconfigured(void) { __asm__ volatile("tilerelease\n\ttilezero %tmm0"); }

void same_tile_twice(void)
{
  /* No assembler writes tdpbf16ps %tmm1, %tmm1, %tmm0. */
  __asm__ volatile("ldtilecfg %0\n\t.byte 0xC4, 0xE2, 0x72, 0x5C, 0xC1" : : "m"(fixed));
}

void unknown(void) { __asm__ volatile("ud2"); }

void configured_by(const uint8_t *config) { __asm__ volatile("ldtilecfg (%0)\n\ttilerelease" : : "r"(config)); }

void dot_only(const uint8_t *config)
{
  __asm__ volatile("ldtilecfg (%0)\n\ttdpbssd %%tmm2, %%tmm1, %%tmm0" : : "r"(config));
}
