// What every kernel of this folder is handed, one struct by value. launch.py packs it: PARAMS there is this layout.
#pragma once

struct Strides {
    long long batch, head, row;  // in elements; a row's own elements are neighbours
};

struct Params {
    // 16-bit or float32 by the kernel's class; null where a pass has no such tensor
    const void *q, *k, *v;
    void *o;
    float *lse;           // [batch, heads, seq_q], natural log
    const float *slopes;  // null without ALiBi
    const void *go;       // dO
    float *lse2, *delta;  // [batch * heads, rows_padded]: lse in log2, +inf for a row that sees no key; o.do
    void *dq, *dk, *dv;
    float *shares;  // [batch * heads, parts, rows_padded, BLOCK_D]: what each part of the keys adds to dq, before dscale
    Strides sq, sk, sv, so, sgo, sdq, sdk, sdv;
    long long slopes_batch, slopes_head;
    int heads, group, seq_q, seq_kv, rows_padded, head_dim;
    int left, right;  // query i (bottom-right: row + seq_kv - seq_q) sees keys i - left .. i + right
    // Logits in the log2 domain: s * scale, or with SOFTCAP cap * tanh(s * scale); dscale is the user's scale.
    float scale, cap, dscale;
    int parts;
};
