// Counters of the bins of a histogram in block RAM: one increment a cycle to any bins, also the same one again.
// `walk` reads bin `walk_bin` and clears it; its count follows one cycle later. No increment may come during a walk.
module cec_hist #(
    parameter LOG2 = 11,
    parameter WIDTH = 18
) (
    input  wire             clk,
    input  wire             inc,
    input  wire [LOG2-1:0]  bin,
    input  wire             walk,
    input  wire [LOG2-1:0]  walk_bin,
    output wire [WIDTH-1:0] count
);
    (* ram_style = "block" *) reg [WIDTH-1:0] mem [0:(1 << LOG2)-1];
    reg [WIDTH-1:0] read, last;
    reg [LOG2-1:0] at, last_at;
    reg inc1 = 0, walk1 = 0, last_valid = 0;
    // The RAM returns what a bin held before a write of the same cycle, so the last written count is kept beside it.
    wire [WIDTH-1:0] next = (last_valid && last_at == at ? last : read) + 1'b1;
    assign count = read;

    always @(posedge clk) begin
        read <= mem[walk ? walk_bin : bin];
        at <= walk ? walk_bin : bin;
        inc1 <= inc & ~walk;
        walk1 <= walk;
        if (inc1 | walk1) mem[at] <= walk1 ? {WIDTH{1'b0}} : next;
        last <= next;
        last_at <= at;
        last_valid <= inc1;
    end
endmodule
